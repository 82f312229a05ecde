"""What the ranks of the layout tests do. Each job runs several layouts one after another in the same processes.

The test process itself does not import this: it would load Megatron-core.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import FAMILIES, ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.selection import ROUTED_KINDS
from dash_dist.config.trainable import TrainableSection
from dash_dist.context_parallel import DashAttention, shard_positions
from dash_dist.megatron import model as model_module
from dash_dist.megatron import optimizer as optimizer_module
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.weights import global_name
from dash_kernels import ChunkGrid
from tests.support.models import (
    CHUNK_SIZE,
    MODEL,
    SEQUENCE_LENGTH,
    STEPS_AFTER_LOAD,
    STEPS_BEFORE_SAVE,
    VOCAB_SIZE,
    Batch,
    Case,
    Measured,
    global_batch,
    packed_batch,
    packed_documents_alone,
)

BAD_BORDERS = {
    "late": torch.tensor([16, 128], dtype=torch.int32),
    "early": torch.tensor([0, 112], dtype=torch.int32),
    "falling": torch.tensor([0, 64, 32, 128], dtype=torch.int32),
    "partial": torch.tensor([0, 40, 128], dtype=torch.int32),
    "int64": torch.tensor([0, 128]),
    "one entry": torch.tensor([0], dtype=torch.int32),
}


def micro_batches(step: int, dims: ParallelDims, case: Case) -> list[Batch]:
    if case.packed:
        return packed_batch(step)[dims.dp_rank :: dims.dp_size]
    batch = global_batch(step)
    mine = [tensor[dims.dp_rank :: dims.dp_size] for tensor in (batch.tokens, batch.labels, batch.loss_mask)]
    pieces = (tensor.split(case.micro_batch_size) for tensor in mine)
    return [Batch(*of_one) for of_one in zip(*pieces, strict=True)]


@contextmanager
def engine_of(
    case: Case,
    *,
    model: ModelConfig = MODEL,
    vocab_size: int = VOCAB_SIZE,
    trainable: TrainableSection | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
) -> Iterator[MegatronEngine]:
    parallel = ParallelConfig(
        tensor=case.tensor,
        context=case.context,
        pipeline=case.pipeline,
        sequence_parallel=case.sequence_parallel,
        distributed_optimizer=case.distributed_optimizer,
        recompute=case.recompute,
        recompute_modules=case.recompute_modules,
        recompute_layers=case.recompute_layers,
        overlap_gradients=case.overlap_gradients,
        fused_kernels=case.fused_kernels,
        mlp_tile_tokens=case.mlp_tile_tokens,
        fp8_linears=case.fp8_linears,
        offload_activations=case.offload_activations,
    )
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    logits_per_piece = model_module.LOGITS_PER_PIECE
    of_buckets = DistributedDataParallelConfig
    if case.overlap_gradients:
        optimizer_module.DistributedDataParallelConfig = functools.partial(of_buckets, bucket_size=2000)
    model_module.LOGITS_PER_PIECE = case.logits_per_piece or logits_per_piece
    try:
        yield MegatronEngine(
            model.model_copy(
                update={
                    "tie_embeddings": case.tie_embeddings,
                    "family": case.family,
                    "qk_norm": FAMILIES[case.family].qk_norm,
                }
            ),
            AttentionConfig(
                kind=case.kind,
                window=case.window,
                top_chunks=case.top_chunks,
                infllmv2=case.infllmv2,
                nsa=case.nsa,
                chunk_size=CHUNK_SIZE,
                routing_scale=case.routing_scale,
                attend_first_chunk=case.attend_first_chunk,
                layout=case.layout,
                exchange=case.exchange,
                ranks_per_node=case.ranks_per_node,
            ),
            parallel,
            OptimizerConfig(lr=1e-2, warmup_steps=2, grad_clip=case.grad_clip, offload_moments=case.offload_moments),
            dims=dims,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            total_steps=10,
            trainable=trainable,
        )
    finally:
        model_module.LOGITS_PER_PIECE = logits_per_piece
        optimizer_module.DistributedDataParallelConfig = of_buckets
        dims.close()


def kinds_of(case: Case) -> tuple[str, ...]:
    attention = AttentionConfig(
        kind=case.kind,
        window=case.window,
        top_chunks=case.top_chunks,
        infllmv2=case.infllmv2,
        nsa=case.nsa,
        chunk_size=CHUNK_SIZE,
    )
    return attention.kinds(MODEL.num_layers)


def ranks_of(dims: ParallelDims) -> dict[str, int]:
    return {"tp": dims.tp_rank, "cp": dims.cp_rank, "pp": dims.pp_rank, "dp": dims.dp_rank}


def train(engine: MegatronEngine, case: Case, steps: int) -> list[float]:
    return [engine.train_step(micro_batches(engine.step, engine.dims, case)).loss for _ in range(steps)]


def measure_step(case: Case) -> Measured:
    """Gradients of the first step and the weights after it."""
    with engine_of(case) as engine:
        measured = Measured(ranks_of(engine.dims))
        engine.telemetry.record_routing = engine.telemetry.record_seconds = True
        engine.telemetry.record_selections = [
            layer for layer, kind in enumerate(kinds_of(case)) if kind in ROUTED_KINDS
        ]
        started = time.perf_counter()
        result = engine.train_step(micro_batches(0, engine.dims, case))
        measured.step_seconds = time.perf_counter() - started
        measured.seconds = engine.telemetry.seconds_by_part()
        measured.maps = [(one.selected, one.available) for one in engine.telemetry.selection_maps()]
        measured.losses, measured.tokens, measured.grad_norm = [result.loss], result.tokens, result.grad_norm
        for routing in engine.telemetry.routing_statistics():
            measured.density.append(routing.density)
            measured.selected.append(routing.selected.tolist())
        copy_tensors(engine, measured)
        return measured


def copy_tensors(engine: MegatronEngine, measured: Measured) -> None:
    """Add the gradients of the trained weights, and all weights."""
    for name, parameter in engine.model.named_parameters():
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        name = global_name(engine.model, name)
        if parameter.requires_grad:
            measured.gradients[name] = parameter.main_grad.clone(), dim
        measured.weights[name] = parameter.detach().clone(), dim


def measure_steps(cases: dict[str, Case]) -> dict[str, Measured]:
    return {name: measure_step(case) for name, case in cases.items()}


def losses_of_steps(cases: dict[str, Case], steps: int) -> dict[str, list[float]]:
    losses = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            losses[name] = train(engine, case, steps)
    return losses


def train_and_save(cases: dict[str, Case], folder: Path) -> dict[str, list[float]]:
    """Losses of an uninterrupted run, with a checkpoint in `folder`/name on the way."""
    losses = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            losses[name] = train(engine, case, STEPS_BEFORE_SAVE)
            at_once = engine.start_save(folder / f"{name}, at once", background=False).finish()
            save = engine.start_save(folder / name, background=True)
            losses[name] += train(engine, case, STEPS_AFTER_LOAD)
            assert save.finish() == at_once  # sizes and checksums: what was trained meanwhile is not in it
    return losses


def load_and_train(loads: list[tuple[str, Case]], folder: Path) -> list[tuple[list[str], int, list[float]]]:
    """Per load: what changed in the function, the step, and the losses that follow, each in a new engine."""
    results = []
    for saved, case in loads:
        with engine_of(case) as engine:
            changes = engine.load(folder / saved)
            results.append((changes, engine.step, train(engine, case, STEPS_AFTER_LOAD)))
    return results


def load_and_read(cases: dict[str, Case], folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per checkpoint: the logits of the first chunk of every sequence [b, s, vocab], and the summary queries of all
    layers [layers, kv heads, dim]."""
    read = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            engine.load(folder / name)
            with torch.no_grad():
                logits = engine.model(global_batch(0).tokens[:, :CHUNK_SIZE], None, None)
            queries = [attention.summary_query.detach().clone() for _, attention in engine.model.attentions()]
            read[name] = logits, torch.stack(queries)
    return read


def load_and_judge(cases: dict[str, Case], folder: Path) -> dict[str, tuple[float, float]]:
    """Per checkpoint: the loss of `global_batch(0)` by a training step, and by the logits that an evaluation gets."""
    judged = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            engine.load(folder / name)
            batch = global_batch(0)
            with torch.no_grad():
                logits = engine.model(batch.tokens, None, None)  # [b, s, padded vocab]
            evaluated = F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask])
            judged[name] = engine.train_step(micro_batches(0, engine.dims, case)).loss, evaluated.item()
    return judged


def logits_of_last_rank(case: Case) -> tuple[dict[str, int], torch.Tensor]:
    """How much this rank's logits [b, s, vocab] move when the first token of the sequence changes."""
    with engine_of(case) as engine:
        tokens = global_batch(0).tokens
        changed = tokens.clone()
        changed[:, 0] = (changed[:, 0] + 1) % VOCAB_SIZE
        dims = engine.dims
        positions = shard_positions(SEQUENCE_LENGTH, dims.cp_rank, dims.cp_size, case.layout)
        with torch.no_grad():
            before, after = (engine.model(t[:, positions], None, None) for t in (tokens, changed))
        moved = (after - before)[..., :VOCAB_SIZE].abs()  # the columns of the padding are -inf in both
        return ranks_of(engine.dims), moved.amax(dim=(0, 2))


def errors_and_skips(folder: Path) -> dict[str, Any]:
    """What each rank sees when one rank is given something wrong."""
    seen: dict[str, Any] = {}

    def catch(name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"

    case = Case(context=2, micro_batch_size=1, grad_clip=1.0, distributed_optimizer=True)
    with engine_of(case) as engine:
        rank = engine.dims.rank
        good = micro_batches(0, engine.dims, case)
        short = [Batch(batch.tokens[:, :-8], batch.labels[:, :-8], batch.loss_mask[:, :-8]) for batch in good]
        catch("short at rank 1", engine.train_step, short if rank == 1 else good)
        catch("one less at rank 1", engine.train_step, good[1:] if rank == 1 else good)
        catch("other data at rank 1", engine.train_step, micro_batches(rank, engine.dims, case))
        blank = [Batch(batch.tokens, batch.labels, torch.zeros_like(batch.loss_mask)) for batch in good]
        catch("no loss token", engine.train_step, blank)
        foreign = [Batch(batch.tokens + VOCAB_SIZE, batch.labels, batch.loss_mask) for batch in good]
        catch("foreign tokens", engine.train_step, foreign)
        packed = packed_batch(0)
        moved = [dataclasses.replace(packed[0], cu_seqlens=packed[1].cu_seqlens), *packed[1:]]
        catch("other borders at rank 1", engine.train_step, moved if rank == 1 else packed)
        joined = [dataclasses.replace(packed[0], cu_seqlens=None), *packed[1:]]
        catch("no borders at rank 1", engine.train_step, joined if rank == 1 else packed)
        for name, borders in BAD_BORDERS.items():
            bad = [dataclasses.replace(packed[0], cu_seqlens=borders), *packed[1:]]
            catch(name, engine.train_step, bad if rank == 1 else packed)
        four = dataclasses.replace(global_batch(0), cu_seqlens=packed[0].cu_seqlens)
        catch("borders for four sequences at rank 1", engine.train_step, [four] if rank == 1 else packed)
        catch("no routing", engine.telemetry.routing_statistics)
        catch("no seconds", engine.telemetry.seconds_by_part)
        engine.telemetry.record_selections = [1]
        catch("no selections", engine.telemetry.selection_maps)
        engine.telemetry.record_selections = ()
        catch("no checkpoint", engine.load, folder / "nothing")
        (folder / "taken").mkdir(exist_ok=True)
        (folder / "taken" / f"rank{rank}").touch()
        catch("taken directory", lambda: engine.start_save(folder / "taken", background=True))
        catch("second dims", lambda: engine_of(case).__enter__())
        seen["step after errors"] = engine.step

        engine.train_step(good)
        before = [parameter.detach().clone() for parameter in engine.model.parameters()]
        engine.model.output_layer.weight.data[0, 0] = float("inf")
        before[-1][0, 0] = float("inf")
        result = engine.train_step(good)
        seen["skipped"] = result.skipped
        after = list(engine.model.parameters())
        seen["unchanged"] = all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
        engine.model.output_layer.weight.data[0, 0] = 0.0
        seen["next"] = engine.train_step(good).skipped

        engine.start_save(folder / "saved", background=True).finish()
    with engine_of(Case(context=2, distributed_optimizer=False, tie_embeddings=True)) as engine:
        catch("other model", engine.load, folder / "saved")
    catch("world size", lambda: engine_of(Case(tensor=2, context=2)).__enter__())
    return seen


def documents_alone(case: Case) -> Measured:
    """What `measure_step` measures of a packed case, from the documents one by one, without engine and schedule."""
    with engine_of(case) as engine:
        parameters = dict(engine.model.named_parameters())
        documents = packed_documents_alone(0)
        tokens = sum(int(document.loss_mask.sum()) for document in documents)
        losses = [
            engine.model(document.tokens, None, None, labels=document.labels)[document.loss_mask].sum()
            for document in documents
        ]
        loss = torch.stack(losses).sum() / tokens
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return Measured(
            ranks_of(engine.dims),
            losses=[loss.item()],
            tokens=tokens,
            grad_norm=torch.stack([gradient.norm() for gradient in gradients]).norm().item(),
            gradients={
                global_name(engine.model, name): (gradient, None)
                for name, gradient in zip(parameters, gradients, strict=True)
            },
        )


def borders_seen_by_the_attention(case: Case) -> list[list[bool]]:
    """Per call of an attention in a step, in order: for each micro-batch, whether it was given its documents."""
    with engine_of(case) as engine:
        given = packed_batch(0)
        seen: list[list[bool]] = []
        given_as: dict[ChunkGrid, int] = {}  # grids in the order of the micro-batches
        forward = DashAttention.forward

        def recorded(self: DashAttention, *tensors: torch.Tensor, chunks: ChunkGrid) -> torch.Tensor:
            batch = given_as.setdefault(chunks, len(given_as))
            borders = ChunkGrid.packed(given[batch].cu_seqlens.tolist(), CHUNK_SIZE).firsts
            assert torch.equal(chunks.firsts, borders)
            seen.append([index == batch for index in range(len(given))])
            return forward(self, *tensors, chunks=chunks)

        with mock.patch.object(DashAttention, "forward", recorded):
            engine.train_step(given)
        return seen


def undecayed_weights() -> set[str]:
    with engine_of(Case()) as engine:
        names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
        return {
            names[id(parameter)]
            for group in engine._optimizer.megatron.param_groups
            for parameter in group["params"]
            if group["weight_decay"] == 0.0
        }

"""What the ranks of the tests of sequence parallelism do. The test process does not import this."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dash_dist.config.trainable import TrainableSection
from dash_dist.megatron.sequence_shards import join_pieces, pieces_of_shards, shard_of_marked
from tests.megatron.megatron_jobs import copy_tensors, engine_of, ranks_of
from tests.megatron.sequence_parallel_cases import MODEL, Run, batches
from tests.support.models import Case, Measured


def measure(runs: dict[str, Run], seed: int) -> dict[str, Measured]:
    """Loss, norm, gradients of a step and the weights after it, by name."""
    return {name: _measure(run, seed) for name, run in runs.items()}


def _measure(run: Run, seed: int) -> Measured:
    model = MODEL.model_copy(update=dict(run.model))
    trainable = TrainableSection.model_validate(dict(run.trainable))
    with engine_of(run.case, model=model, trainable=trainable, sequence_length=run.length) as engine:
        _move_from_zero(engine.model)
        measured = Measured(ranks_of(engine.dims))
        result = engine.train_step(batches(run, seed, engine.dims.dp_rank, engine.dims.dp_size))
        measured.losses, measured.grad_norm = [result.loss], result.grad_norm
        copy_tensors(engine, measured)
        return measured


def _move_from_zero(model: Any) -> None:
    """Give the adapters' B, which begin at zero, numbers that do not depend on the layout."""
    for name, parameter in model.named_parameters():
        if name.endswith((".lora.o_proj.b", ".lora.down_proj.b")):
            values = torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter)
        elif name.endswith(".b"):
            rank, size = model.tp_group.rank(), model.tp_group.size()
            whole = torch.linspace(-0.1, 0.1, parameter.numel() * size).view(-1, parameter.shape[1])
            values = whole.chunk(size)[rank]
        else:
            continue
        parameter.data.copy_(values)


def evaluations(cases: dict[str, Case], length: int) -> dict[str, tuple[Any, torch.Tensor]]:
    """Losses by position, and next tokens at positions of one tensor-parallel rank alone, by name."""
    found = {}
    for name, case in cases.items():
        with engine_of(case, model=MODEL, sequence_length=length) as engine:
            dims = engine.dims
            losses = engine.evaluate(batches(Run(case, length), 3, dims.dp_rank, dims.dp_size), (20, length))
            tokens = batches(Run(case, length), 3, 0, 1)[0].tokens[:1]
            found[name] = losses, engine.next_tokens(tokens, torch.tensor([[0, 3, 9]]))
    return found


def order_of_pieces(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the tokens as the gathered pieces hold them, put back into order; and their labels likewise."""
    shards, rank = dist.get_world_size(), dist.get_rank()
    tokens = torch.arange(7 * shards)
    labels = torch.stack([tokens, tokens + 100])  # [b, s]
    hidden = labels.T.chunk(shards)[rank][..., None].contiguous()  # [s / shards, b, 1]
    gathered, found = [], []
    for piece, targets in pieces_of_shards(hidden, labels, shards, rows):
        parts = [torch.empty_like(piece) for _ in range(shards)]
        dist.all_gather(parts, piece.contiguous())
        gathered.append(torch.cat(parts)[..., 0].T)
        found.append(targets)
    return join_pieces(gathered, shards), join_pieces(found, shards)


def marked_rows(counts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each number of marked tokens: the rows that the ranks hold together, and those of the whole sequence."""
    with engine_of(Case(tensor=2)) as engine:
        group = engine.model.tp_group
        found = []
        for count in counts:
            generator = torch.Generator().manual_seed(count)
            whole = torch.randn(10, 3, 4, generator=generator)  # [s, b, hidden]
            marked = torch.zeros(30, dtype=torch.bool)
            marked[torch.randperm(30, generator=generator)[:count]] = True
            marked = marked.view(3, 10)
            own = shard_of_marked(whole.chunk(2)[group.rank()], marked, group)
            parts = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(parts, own, group=group)
            found.append((torch.cat(parts), whole.transpose(0, 1)[marked]))
        return found


def tokens_of_norms(case: Case, length: int) -> list[tuple[int, ...]]:
    """Shapes that the layers' first norms are given."""
    with engine_of(case, model=MODEL, sequence_length=length) as engine:
        shapes: list[tuple[int, ...]] = []
        for layer in engine.model.decoder.layers:
            layer.input_layernorm.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        engine.evaluate(batches(Run(case, length), 0, 0, 1), (length,))
        return shapes

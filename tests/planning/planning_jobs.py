"""What the ranks of the planner's tests do: build the real model, and look at what it holds and sends.

The test process itself does not import this: it would load Megatron-core.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers as linears
from megatron.core.tensor_parallel import mappings

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.context_parallel.kept_output import _Inputs
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.model import build_model, transformer_config
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.weights import global_name
from tests.planning.planning_cases import CHUNK_SIZE, GLOBAL_BATCH, MODEL, SEQUENCE_LENGTH, VOCAB_SIZE, Case, batch


@dataclass(frozen=True)
class Held:
    """Of one rank. buffer, gradients: numbers in Megatron's buffers; states: in the optimizer's three tensors each;
    sent: bytes to other ranks in a step."""

    stage: int
    weights: dict[str, int]
    buffer: int
    gradients: int
    states: dict[str, int]
    sent: int | None


def held_by(cases: list[Case]) -> list[Held]:
    """What this rank holds and sends, case by case."""
    return [_held(case) for case in cases]


def _held(case: Case) -> Held:
    parallel = ParallelConfig(
        tensor=case.tensor,
        pipeline=case.pipeline,
        context=case.context,
        distributed_optimizer=case.distributed_optimizer,
    )
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    try:
        model = MODEL.model_copy(update={"tie_embeddings": case.tie_embeddings})
        engine = MegatronEngine(
            model,
            AttentionConfig(chunk_size=CHUNK_SIZE, exchange=case.exchange, routing_scale=1e-3, **case.attention),
            parallel,
            OptimizerConfig(lr=1e-3),
            dims=dims,
            vocab_size=VOCAB_SIZE,
            sequence_length=SEQUENCE_LENGTH,
            total_steps=2,
            trainable=case.trainable,
        )
        engine.train_step([batch() for _ in range(GLOBAL_BATCH // dims.dp_size)])
        sent = None
        if case.context > 1:
            sent = sum(attention.traffic.take().sent_bytes for _, attention in engine.model.attentions())
        buffers = engine._wrapped.buffers
        return Held(
            stage=dims.pp_rank,
            weights={
                global_name(engine.model, name): weight.numel() for name, weight in engine.model.named_parameters()
            },
            buffer=sum(buffer.param_data.numel() for buffer in buffers if buffer.param_data is not None),
            gradients=sum(buffer.grad_data.numel() for buffer in buffers),
            states=_states(engine),
            sent=sent,
        )
    finally:
        dims.close()


def _states(engine: MegatronEngine) -> dict[str, int]:
    numbers = {"weights": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for part in engine._optimizer.megatron.chained_optimizers:
        for group in part.optimizer.param_groups:
            for weight in group["params"]:
                numbers["weights"] += weight.numel()
                for name in ("exp_avg", "exp_avg_sq"):
                    numbers[name] += part.optimizer.state[weight][name].numel()
    return numbers


def tensor_bytes(layers: int, sequence_parallel: bool) -> int:
    """Bytes that a rank sends to its tensor-parallel group in a bfloat16 step."""
    parallel = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel)
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    sent = 0

    def counted(collective: Any, part: float) -> Any:
        def call(*tensors: torch.Tensor, **options: Any) -> Any:
            nonlocal sent
            sent += round(part * max(tensor.nbytes for tensor in tensors))
            return collective(*tensors, **options)

        return call

    try:
        shape = MODEL.model_copy(update={"num_layers": layers})
        config = transformer_config(shape, parallel, dtype=torch.bfloat16, device=dims.device)
        attention = AttentionConfig(chunk_size=CHUNK_SIZE)
        model = build_model(
            config, shape, attention, dims, vocab_size=VOCAB_SIZE, sequence_length=SEQUENCE_LENGTH, seed=0
        ).bfloat16()
        tokens = torch.zeros(1, SEQUENCE_LENGTH, dtype=torch.int64)
        with contextlib.ExitStack() as patches:
            for module in (linears, mappings):  # half of the whole tensor goes to the other of two ranks
                for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
                    patches.enter_context(mock.patch.object(module, name, counted(getattr(module, name), 0.5)))
            patches.enter_context(mock.patch.object(torch.distributed, "all_reduce", counted(dist.all_reduce, 1.0)))
            model(tokens, None, None, labels=tokens).sum().backward()
        return sent
    finally:
        dims.close()


def saved_bytes(
    batch: int,
    sequence_length: int,
    layers: int,
    settings: dict[str, Any],
    attention: AttentionConfig | None = None,
) -> dict[str, int]:
    """dtype -> bytes of the distinct tensors, but for weights, that autograd keeps of a bfloat16 forward pass, and
    that the attention keeps for a recomputation."""
    attention = attention or AttentionConfig(chunk_size=CHUNK_SIZE)
    parallel = ParallelConfig.model_validate(settings)
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    try:
        shape = MODEL.model_copy(update={"num_layers": layers})
        config = transformer_config(shape, parallel, dtype=torch.bfloat16, device=dims.device)
        model = build_model(
            config,
            shape,
            attention,
            dims,
            vocab_size=VOCAB_SIZE,
            sequence_length=sequence_length,
            seed=0,
        ).bfloat16()
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage().data_ptr()
            if storage not in weights:
                kept.setdefault(storage, tensor)
            return tensor

        tokens = torch.zeros(batch, sequence_length, dtype=torch.int64)
        pack = _Inputs.pack

        def pack_and_keep(inputs: _Inputs, tensor: torch.Tensor) -> Any:
            packed = pack(inputs, tensor)
            return keep(packed) if isinstance(packed, torch.Tensor) else packed

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            mock.patch.object(_Inputs, "pack", pack_and_keep),
        ):
            model(tokens, None, None, labels=tokens)
        for _, attention in model.attentions():
            for one in attention.memory._passes.values() if attention.memory is not None else ():
                for tensor in vars(one).values():
                    if isinstance(tensor, torch.Tensor):  # a routing, or the output of a kept call
                        keep(tensor)
        sizes: dict[str, int] = {}
        for tensor in kept.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            sizes[kind] = sizes.get(kind, 0) + tensor.untyped_storage().nbytes()
        return sizes
    finally:
        dims.close()

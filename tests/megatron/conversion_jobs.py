"""What the ranks of the tests of the conversion phase do. The test process does not import this."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.megatron.conversion import Conversion
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from dash_kernels import reference_dash_attention
from tests.megatron.megatron_jobs import micro_batches, ranks_of
from tests.megatron.trainable_jobs import Seen, look
from tests.support.models import CHUNK_SIZE, MODEL, ROUTING_SCALE, SEQUENCE_LENGTH, VOCAB_SIZE, Case

QUERY = {"parameters": [{"match": "*.summary_query"}]}


def engine_of(
    case: Case, dims: ParallelDims, parallel: ParallelConfig, attention: dict[str, Any], trainable: Any
) -> Any:
    return MegatronEngine(
        MODEL,
        AttentionConfig(chunk_size=CHUNK_SIZE, routing_scale=ROUTING_SCALE, layout=case.layout, **attention),
        parallel,
        OptimizerConfig(lr=3e-1, grad_clip=None),
        dims=dims,
        vocab_size=VOCAB_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        total_steps=20,
        trainable=TrainableSection.model_validate(trainable),
    )


def run(
    case: Case, attention: dict[str, Any], trainable: dict[str, Any], steps: int, keep: bool = False
) -> tuple[Seen, list[float], list[tuple[torch.Tensor, ...]]]:
    """Steps on one batch; the local losses, and with `keep` the inputs of every layer in the first step."""
    parallel = ParallelConfig(
        tensor=case.tensor, context=case.context, pipeline=case.pipeline, recompute=case.recompute
    )
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    inputs: list[tuple[torch.Tensor, ...]] = []
    real = Conversion.__call__

    def call(self: Conversion, q: Any, k: Any, v: Any, chunks: Any, *, training: bool) -> torch.Tensor:
        inputs.append((q.detach().clone(), k.detach().clone(), v.detach().clone()))
        return real(self, q, k, v, chunks, training=training)

    try:
        engine = engine_of(case, dims, parallel, attention, trainable)
        seen, local = Seen(ranks_of(dims)), []
        with torch.no_grad():  # a router that has an opinion
            for layer, one in engine.model.attentions():
                generator = torch.Generator().manual_seed(layer)
                full = torch.randn(MODEL.num_kv_heads, MODEL.resolved_head_dim, generator=generator)
                one.summary_query.copy_(full.chunk(dims.tp_size)[dims.tp_rank])
        for step in range(steps):
            with mock.patch.object(Conversion, "__call__", call if keep and step == 0 else real):
                result = engine.train_step(micro_batches(0, dims, case))
            seen.losses.append(result.loss)
            seen.grad_norms.append(result.grad_norm)
            local.append(result.curves.get("routing/conversion_loss", 0.0))
            if step == 0:
                look(engine, seen)
                first = seen.gradients
                seen.gradients = {}
        look(engine, seen)
        seen.gradients = first
        return seen, local, inputs
    finally:
        dims.close()


def run_all(cases: dict[str, Case], steps: int) -> dict[str, tuple[Seen, list[float], list[tuple[torch.Tensor, ...]]]]:
    return {name: run(case, {"conversion": "output"}, QUERY, steps) for name, case in cases.items()}


def explicit(inputs: list[tuple[torch.Tensor, ...]]) -> list[tuple[float, torch.Tensor]]:
    """Per layer, the mean local loss of all tokens and its gradient in float64, by the reference."""
    found = []
    layers = MODEL.num_layers
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        query = torch.randn(MODEL.num_kv_heads, MODEL.resolved_head_dim, generator=generator).double()
        query.requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        positions = 0
        for q, k, v in inputs[layer::layers]:
            q, k, v = q.double(), k.double(), v.double()
            group = q.shape[2] // k.shape[2]
            keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
            scores = torch.einsum("bthd,bshd->bhts", q, keys) / q.shape[-1] ** 0.5
            future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
            dense = torch.einsum("bhts,bshd->bthd", weights, values)
            dash, _ = reference_dash_attention(q, k, v, query, chunk_size=CHUNK_SIZE, routing_scale=ROUTING_SCALE)
            loss = loss + ((dash - dense).square().sum(-1) / dense.square().sum(-1)).mean(dim=-1).sum()
            positions += q.shape[0] * q.shape[1]
        loss = loss / positions
        (gradient,) = torch.autograd.grad(loss, query)
        found.append((loss.item(), gradient))
    return found


def refused(trainable: dict[str, Any]) -> str:
    parallel = ParallelConfig()
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    try:
        engine_of(Case(), dims, parallel, {"conversion": "output"}, trainable)
        return ""
    except ValueError as error:
        return str(error)
    finally:
        dims.close()

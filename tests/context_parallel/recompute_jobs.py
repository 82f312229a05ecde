"""What ranks do to show that layers under activation checkpointing find their plans once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import (
    HEAD_DIM,
    SETTINGS,
    Counted,
    Inputs,
    Way,
    counted,
    crossing_documents,
    device,
    name_of,
    same_inputs,
    ways,
)
from torch.utils.checkpoint import checkpoint

from dash_dist import DashAttention, split_sequence
from dash_dist.context_parallel.topology import Topology
from dash_dist.context_parallel.traffic import TrafficSummary

LAYERS = 1


@dataclass
class Trained:
    """Gradients of all inputs and parameters, and what it took."""

    gradients: list[torch.Tensor]
    given: Counted
    traffic: list[TrafficSummary]
    memory_is_empty: bool

    @property
    def sent_bytes(self) -> int:
        return sum(summary.sent_bytes for summary in self.traffic)


def train(micro_batches: list[Inputs], way: Way, *, recompute: bool, use_reentrant: bool | None) -> Trained:
    """Forward passes of all micro-batches, then their backward passes, in the same order. use_reentrant None: without
    checkpointing.
    """
    world, size = dist.group.WORLD, dist.get_world_size()
    call: dict[str, Any] = {"cp_group": world, "recompute": recompute, "prior_sigma": 1.5, **way, **SETTINGS}
    layers = [DashAttention(2, HEAD_DIM, **call, device=device(), dtype=torch.float64) for _ in range(LAYERS)]

    def stack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        for layer in layers:
            q = layer(q, k, v, cu_seqlens)
        return q

    def forward(inputs: Inputs) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = [split_sequence(x, world).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        if use_reentrant is None:
            return leaves, stack(*leaves, inputs.cu_seqlens)
        return leaves, checkpoint(stack, *leaves, inputs.cu_seqlens, use_reentrant=use_reentrant)

    with counted(Topology(size, size)) as given:
        under_way = [forward(inputs) for inputs in micro_batches]
        for inputs, (_, out) in zip(micro_batches, under_way, strict=True):
            out.backward(split_sequence(inputs.grad, world))
    leaves = [leaf for leaves, _ in under_way for leaf in leaves]
    gradients = [x.grad for x in (*leaves, *(layer.summary_query for layer in layers)) if x.grad is not None]
    assert len(gradients) == len(leaves) + LAYERS
    memories = [layer.memory for layer in layers if layer.memory is not None]
    assert len(memories) == (LAYERS if recompute else 0)
    is_empty = all(memory.recall() is None for memory in memories)
    return Trained(gradients, given, [layer.traffic.take() for layer in layers], is_empty)


def recomputed_layers() -> dict[str, dict[str, Any]]:
    """Against the same layers without checkpointing, for two micro-batches in flight with documents of their own."""
    chunks = 2 * dist.get_world_size()
    micro_batches = [same_inputs(chunks, batch=1), same_inputs(chunks, batch=1, bounds=crossing_documents(chunks))]
    found = {}
    for way in ways()[1:]:  # "auto" is one of the others
        plain = train(micro_batches, way, recompute=False, use_reentrant=None)
        reentrant = train(micro_batches, way, recompute=True, use_reentrant=True)
        without = train(micro_batches, way, recompute=False, use_reentrant=False)
        found[name_of("zigzag", way)] = {
            "reentrant is right": all(map(torch.equal, reentrant.gradients, plain.gradients)),
            "non-reentrant is right": all(map(torch.equal, without.gradients, plain.gradients)),
            "memory is empty": reentrant.memory_is_empty,
            "bytes": (plain.sent_bytes, reentrant.sent_bytes, without.sent_bytes),
            "calls": [run.given.calls for run in (plain, reentrant, without)],
        }
    return found


def evaluation_leaves_nothing_behind() -> bool:
    world = dist.group.WORLD
    inputs = same_inputs(4 * dist.get_world_size(), batch=1)
    layer = DashAttention(2, HEAD_DIM, cp_group=world, recompute=True, device=device(), dtype=torch.float64, **SETTINGS)
    layer.eval()
    with torch.no_grad():
        layer(*(split_sequence(x, world) for x in (inputs.q, inputs.k, inputs.v)))
    assert layer.memory is not None
    return layer.memory.recall() is None

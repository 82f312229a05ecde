"""Jobs that show that layers under activation checkpointing make their plans once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from dash_dist import DashAttention, split_sequence
from dash_dist.context_parallel.exchange_counters import TrafficSummary
from dash_dist.context_parallel.module import Recompute
from dash_dist.cost_model.topology import Topology
from tests.context_parallel.attention_cases import (
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

CALLS = 2  # of the one layer, by every micro-batch


@dataclass
class Trained:
    """Gradients of all inputs and parameters, and what it took."""

    gradients: list[torch.Tensor]
    given: Counted
    traffic: TrafficSummary
    memory_is_empty: bool


def train(
    micro_batches: list[Inputs],
    way: Way,
    *,
    recompute: Recompute,
    use_reentrant: bool | None,
    last_first: bool = False,
    abandoned: bool = False,
) -> Trained:
    """Forward passes of all micro-batches, then their backward passes, in the same order unless `last_first`.

    use_reentrant None: without checkpointing. abandoned: a pass without gradients comes first, and is not recomputed.
    """
    world, size = dist.group.WORLD, dist.get_world_size()
    call: dict[str, Any] = {"cp_group": world, "recompute": recompute, "prior_sigma": 1.5, **way, **SETTINGS}
    layer = DashAttention(2, HEAD_DIM, **call, device=device(), dtype=torch.float64)

    def stack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        for _ in range(CALLS):
            q = layer(q, k, v, cu_seqlens)
        return q

    def forward(inputs: Inputs) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = [split_sequence(x, world).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        if use_reentrant is None:
            return leaves, stack(*leaves, inputs.cu_seqlens)
        return leaves, checkpoint(stack, *leaves, inputs.cu_seqlens, use_reentrant=use_reentrant)

    with counted(Topology(size, size)) as given:
        if abandoned:
            with torch.no_grad():
                forward(micro_batches[-1])
        under_way = [forward(inputs) for inputs in micro_batches]
        order = list(zip(micro_batches, under_way, strict=True))
        for inputs, (_, out) in reversed(order) if last_first else order:
            out.backward(split_sequence(inputs.grad, world))
    leaves = [leaf for leaves, _ in under_way for leaf in leaves]
    gradients = [x.grad for x in (*leaves, layer.summary_query) if x.grad is not None]
    assert len(gradients) == len(leaves) + 1
    assert (layer.memory is not None) == (recompute != "none")
    return Trained(gradients, given, layer.traffic.take(), not layer.memory)


def recomputed_layers() -> dict[str, dict[str, Any]]:
    """Against the same layers without checkpointing, for two micro-batches in flight with documents of their own."""
    chunks = 2 * dist.get_world_size()
    micro_batches = [same_inputs(chunks, batch=1), same_inputs(chunks, batch=1, bounds=crossing_documents(chunks))]
    found = {}
    # "auto" is one of the others.
    for way in [*ways()[1:], {"exchange": "selective", "attend_first_chunk": True}]:
        plain = train(micro_batches, way, recompute="none", use_reentrant=None)
        reentrant = train(micro_batches, way, recompute="full", use_reentrant=True)
        kept = train(micro_batches, way, recompute="selective", use_reentrant=True)
        without = train(micro_batches, way, recompute="none", use_reentrant=False)
        found[name_of("zigzag", way)] = {
            "reentrant is right": all(map(torch.equal, reentrant.gradients, plain.gradients)),
            "kept output is right": all(map(torch.equal, kept.gradients, plain.gradients)),
            "non-reentrant is right": all(map(torch.equal, without.gradients, plain.gradients)),
            "memory is empty": reentrant.memory_is_empty and kept.memory_is_empty,
            "bytes": tuple(run.traffic.sent_bytes for run in (plain, reentrant, kept, without)),
            "calls": [run.given.calls for run in (plain, reentrant, kept, without)],
        }
    return found


def recomputed_in_other_orders(recompute: Recompute) -> dict[str, bool]:
    """Which of them are right, to rounding: gradients of the parameter are summed in another order."""
    chunks, way = 4 * dist.get_world_size(), {"exchange": "selective"}
    micro_batches = [same_inputs(chunks, batch=1), same_inputs(chunks, batch=1)]
    plain = train(micro_batches, way, recompute="none", use_reentrant=None)
    runs = {
        "the last micro-batch first": {"use_reentrant": True, "last_first": True},
        "a pass that nobody recomputes": {"use_reentrant": True, "abandoned": True},
        "non-reentrant": {"use_reentrant": False},
        "no checkpoint": {"use_reentrant": None},
    }
    found = {}
    for name, arguments in runs.items():
        run = train(micro_batches, way, recompute=recompute, **arguments)
        pairs = zip(run.gradients, plain.gradients, strict=True)
        found[name] = all((a - b).abs().max() < 1e-10 * b.abs().max() for a, b in pairs)
        assert run.memory_is_empty or arguments.get("abandoned"), name
    return found


def evaluation_leaves_nothing_behind(recompute: Recompute) -> bool:
    world = dist.group.WORLD
    inputs = same_inputs(4 * dist.get_world_size(), batch=1)
    layer = DashAttention(
        2, HEAD_DIM, cp_group=world, recompute=recompute, device=device(), dtype=torch.float64, **SETTINGS
    )
    layer.eval()
    with torch.no_grad():
        layer(*(split_sequence(x, world) for x in (inputs.q, inputs.k, inputs.v)))
    assert layer.memory is not None
    return len(layer.memory) == 0


def recomputed_again(recompute: Recompute) -> dict[str, bool]:
    """True if a second backward pass over a retained graph, with another micro-batch in flight, gives the same."""
    world, size = dist.group.WORLD, dist.get_world_size()
    layer = DashAttention(
        2, HEAD_DIM, cp_group=world, recompute=recompute, device=device(), dtype=torch.float64, **SETTINGS
    )
    under_way = []
    for inputs in (same_inputs(4 * size, batch=1) for _ in range(2)):
        leaves = [split_sequence(x, world).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = checkpoint(layer, *leaves, use_reentrant=True)
        under_way.append((leaves, out, split_sequence(inputs.grad, world)))
    found = {}
    for name, (leaves, out, grad) in zip(("first", "last"), under_way, strict=True):
        of_passes = []
        for _ in range(2):
            out.backward(grad, retain_graph=True)
            of_passes.append([leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        found[name] = all(map(torch.equal, *of_passes))
    assert layer.memory is not None
    return {**found, "memory is empty": len(layer.memory) == 0}

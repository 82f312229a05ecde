"""Predicted cost of an exchange: `exchange="auto"` takes the cheapest one that fits in memory.

Knows byte counts and links; does not know tensors, nor import torch. One line (`Links.seconds`) holds the model:

    seconds = messages x latency + fast bytes / fast bandwidth + slow bytes / slow bandwidth + merged / memory bandwidth

for the busiest rank, over the forward and the backward pass: K and V travel in both, their gradients in the second.
The choice compares whole transfers; planner and benchmarks subtract the hidden part by `exposed`. All inputs are equal
at every rank of the group, so the choice is, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dash_dist.cost_model.links import Links
from dash_dist.cost_model.topology import Topology

MEMORY_BUDGET = 8 * 2**30
"""Bytes that "auto" lets K, V and gradients of other ranks take: a constant, so that all ranks decide equally."""


@dataclass(frozen=True)
class Busiest:
    """Largest number of blocks of any rank of the group; equal at all ranks.

    fast, slow: blocks that one rank sends, or receives, over links within its node, and to other nodes
    held:       received blocks that one rank holds at once
    """

    fast: int
    slow: int
    held: int


def expected_busiest(blocks: float, tokens: float, topology: Topology, coverage: Callable[[float], float]) -> Busiest:
    """Predict the busiest rank of a selective exchange's plan.

    The busiest rank holds the last tokens of the sequence, or sends the blocks that they need: of all blocks, the
    (P - 1) / P of other ranks at most. In two levels a block crosses to a node once for all its ranks, which share the
    fetching.

    Args:
        blocks: blocks of the whole sequence.
        tokens: tokens of the late piece of a rank's shard, T / 2P in the zigzag layout.
        coverage: share of the chunks of other ranks that so many neighbouring tokens select.
    """
    ranks, node = topology.size, topology.ranks_per_node
    received = coverage(tokens) * blocks * (ranks - 1) / ranks
    if topology.nodes == 1:
        return Busiest(fast=round(received), slow=0, held=round(received))
    if not topology.is_two_level:
        return Busiest(fast=0, slow=round(received), held=round(received))
    slow = coverage(tokens * node) * blocks * ((ranks - node) / ranks) / node
    # A rank forwards blocks that came over the network to those ranks of its node that need them.
    return Busiest(fast=round(received), slow=round(slow), held=round(received + slow))


@dataclass(frozen=True)
class Cost:
    """Load of an exchange on the busiest rank, in a forward and a backward pass.

    messages:               collectives, or steps of the ring, one after another
    fast_bytes, slow_bytes: what goes through its links within the node, and to other nodes
    merged_bytes:           reads and writes of merging what several parts of K and V give. Packing is not counted: it
                            overlaps computation as the transfers do, at several times their speed
    held_bytes:             K, V and gradients that it holds at once in the backward pass, without its own tensors
    """

    messages: int
    fast_bytes: int
    slow_bytes: int
    merged_bytes: int
    held_bytes: int

    def seconds(self, links: Links) -> float:
        return links.seconds(self.fast_bytes, self.slow_bytes, messages=self.messages, merged=self.merged_bytes)


def predict(
    busiest: Busiest,
    topology: Topology,
    *,
    blocks_per_rank: int,
    block_size: int,
    element_size: int,
    gradient_element_size: int,
    group: int,
    planned: bool,
) -> dict[str, Cost]:
    """The cost of every exchange, by name.

    Args:
        busiest: of the plan.
        blocks_per_rank: blocks that a rank holds, B x Hkv x its chunks.
        block_size: numbers in a block, 2 x C x D.
        element_size, gradient_element_size: bytes of a number of K and V, and of their gradients on their way.
        group: query heads of a KV head.
        planned: the plan has been made, and only what follows is counted: the right question once `busiest` is known.
            False also counts the plan's collectives and its wait for the device.
    """
    size, ranks_per_node = topology.size, topology.ranks_per_node
    travelling = block_size * (2 * element_size + gradient_element_size)  # of a block in both passes
    held = block_size * (element_size + gradient_element_size)
    shard = blocks_per_rank * travelling
    # A part of K and V after the first reads and writes the queries' output and gradient so far.
    merge = 2 * 2 * gradient_element_size * group * blocks_per_rank * block_size // 2 if size > 1 else 0

    hops = 2 if topology.is_two_level else 1
    selective = Cost(
        # An all-to-all per hop, three times; the plan's own, its all-reduce, and the wait for the device.
        messages=(3 * hops if size > 1 else 0) + (0 if planned else hops + 2),
        fast_bytes=busiest.fast * travelling,
        slow_bytes=busiest.slow * travelling,
        merged_bytes=merge,
        held_bytes=busiest.held * held,
    )
    # An all-gather takes every shard into a node once, shared by the links of the node's ranks.
    gathered_from_afar = (size - ranks_per_node) * shard // ranks_per_node
    allgather = Cost(
        messages=3 if size > 1 else 0,
        fast_bytes=(size - 1) * shard - gathered_from_afar,
        slow_bytes=gathered_from_afar,
        merged_bytes=merge,
        held_bytes=size * blocks_per_rank * held,
    )
    # A step of the ring takes as long as its slowest link. In the backward pass K and V go round twice, the second time
    # with their gradients one step behind.
    rounds = 3 * (size - 1) * element_size + (size if size > 1 else 0) * gradient_element_size
    passed_on = rounds * blocks_per_rank * block_size
    ring = Cost(
        messages=3 * (size - 1) + (size if size > 1 else 0),
        fast_bytes=passed_on if topology.nodes == 1 else 0,
        slow_bytes=passed_on if topology.nodes > 1 else 0,
        merged_bytes=(size - 1) * merge,
        held_bytes=2 * blocks_per_rank * held,
    )
    return {"selective": selective, "allgather": allgather, "ring": ring}


def cheapest(costs: dict[str, Cost], links: Links, memory_budget: int) -> str:
    """The exchange that takes the fewest seconds, the first of equals, of those that hold at most memory_budget bytes.

    The ring is always allowed: no other exchange that sends everything holds less.
    """
    allowed = [name for name, cost in costs.items() if name == "ring" or cost.held_bytes <= memory_budget]
    return min(allowed, key=lambda name: costs[name].seconds(links))


def forward_share(exchange: str, ranks: int, element_size: int, gradient_element_size: int) -> float:
    """Return the share of an exchange's bytes that the forward pass sends."""
    if exchange == "ring":
        rounds = (ranks - 1) * element_size
        return rounds / (3 * rounds + ranks * gradient_element_size)
    return element_size / (2 * element_size + gradient_element_size)


def exposed(transfers: Sequence[float], beside: Sequence[float]) -> float:
    """Return the part of each transfer that its concurrent computation does not hide, summed."""
    return sum(max(0.0, transfer - hides) for transfer, hides in zip(transfers, beside, strict=True))

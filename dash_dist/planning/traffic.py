"""Bytes that one rank sends in a step, by what they are for and by link, and how K and V travel.

Knows groups of ranks and Megatron-core's collectives. Does not know seconds, but for the choice of an exchange, which
is that of `dash_dist.context_parallel.cost`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dash_dist.context_parallel import cost
from dash_dist.context_parallel.cost import Busiest
from dash_dist.context_parallel.topology import Topology
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.selection import shard_coverage

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Bytes:
    """Sent by one rank: over NVLink inside its node, and over the network."""

    nvlink: float = 0.0
    network: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.nvlink + other.nvlink, self.network + other.network)

    def __mul__(self, times: float) -> Bytes:
        return Bytes(self.nvlink * times, self.network * times)


@dataclass(frozen=True)
class ExchangePlan:
    """The exchange of one layer and micro-batch, of the busiest rank of a context-parallel group.

    Attributes:
        name: "selective", "allgather" or "ring"; "none" without context parallelism.
        forward, backward: sent in the forward pass, and in the backward one: K and V again, and their gradients.
        summaries: of chunks, gathered in the forward pass.
        messages: collectives or steps of the ring, forward and backward.
        merged: bytes of memory that merging what several parts of K and V give reads and writes, in both passes.
        received: blocks of K and V of other ranks that are held at a time.
        coverage: share of the chunks of other ranks that are needed.
    """

    name: str
    forward: Bytes
    backward: Bytes
    summaries: Bytes
    messages: int
    merged: float
    received: float
    coverage: float


NO_EXCHANGE = ExchangePlan("none", Bytes(), Bytes(), Bytes(), 0, 0.0, 0.0, 0.0)


def expected_busiest(sizes: Sizes, topology: Topology, assumptions: Assumptions) -> Busiest:
    """Predict the busiest rank of a selective exchange's plan.

    The busiest rank holds the last tokens of the sequence, or sends what they need: of all blocks, the (P - 1) / P of
    other ranks at most. In two levels a block crosses to a node once for all its ranks, which share the fetching.
    """
    ranks, node = topology.size, topology.ranks_per_node
    blocks = sizes.batch * sizes.kv_heads * sizes.chunks
    piece = sizes.shard / 2  # the late one of a rank's two in the zigzag layout
    received = shard_coverage(piece, assumptions) * blocks * (ranks - 1) / ranks
    if topology.nodes == 1:
        return Busiest(fast=round(received), slow=0, held=round(received))
    elsewhere = (ranks - node) / ranks
    if not topology.is_two_level:
        return Busiest(fast=0, slow=round(received), held=round(received))
    slow = shard_coverage(piece * node, assumptions) * blocks * elsewhere / node
    # What the network brought to the rank of a node's column goes on to those that need it.
    return Busiest(fast=round(received), slow=round(slow), held=round(received + slow))


def plan_exchange(sizes: Sizes, layout: Layout, machine: Machine, assumptions: Assumptions) -> ExchangePlan:
    """The exchange that a layer would use: the layout's, or with "auto" the one that the run's rule would choose."""
    if layout.context == 1:
        return NO_EXCHANGE
    topology = cp_topology(layout, machine)
    busiest = expected_busiest(sizes, topology, assumptions)
    blocks_per_rank = sizes.batch * sizes.kv_heads * sizes.chunks // layout.context
    block_size = 2 * sizes.chunk_size * sizes.head_dim
    costs = cost.predict(
        busiest,
        topology,
        blocks_per_rank=blocks_per_rank,
        block_size=block_size,
        element_size=BF16,
        gradient_element_size=FP32,
        group=sizes.group,
        planned=layout.exchange == "auto",
    )
    name = layout.exchange
    if name == "auto":
        name = cost.cheapest(costs, cost.Links(), cost.MEMORY_BUDGET)
    chosen = costs[name]
    both = Bytes(chosen.fast_bytes, chosen.slow_bytes)
    forward = forward_share(name, layout.context)
    shard_summaries = sizes.batch * sizes.chunks / layout.context * sizes.kv * FP32
    blocks = blocks_per_rank * (layout.context - 1)
    return ExchangePlan(
        name=name,
        forward=both * forward,
        backward=both * (1 - forward),
        summaries=gather(shard_summaries, topology),
        messages=chosen.messages,
        merged=chosen.merged_bytes,
        received={"selective": busiest.held, "allgather": blocks + blocks_per_rank, "ring": blocks_per_rank}[name],
        coverage=busiest.held / blocks if blocks else 0.0,
    )


def forward_share(exchange: str, ranks: int) -> float:
    """Return the share of an exchange's bytes that the forward pass sends."""
    if exchange == "ring":
        return (ranks - 1) * BF16 / (3 * (ranks - 1) * BF16 + ranks * FP32)
    return BF16 / (2 * BF16 + FP32)


def cp_topology(layout: Layout, machine: Machine) -> Topology:
    per_node = machine.ranks_per_node(layout.context, layout.tensor)
    return Topology(layout.context, per_node if layout.context % per_node == 0 else 1)


def gather(shard_bytes: float, topology: Topology) -> Bytes:
    """An all-gather of a shard, or a reduce-scatter to one: what leaves a rank. A node fetches each shard of others
    once, its ranks by turns."""
    size, node = topology.size, topology.ranks_per_node
    network = (size - node) * shard_bytes / node if topology.nodes > 1 else 0.0
    return Bytes((size - 1) * shard_bytes if node > 1 else 0.0, network)


def all_reduce(size_bytes: float, ranks: int, stride: int, machine: Machine) -> Bytes:
    """Return the bytes of an all-reduce, by a reduce-scatter and an all-gather."""
    if ranks == 1:
        return Bytes()
    per_node = machine.ranks_per_node(ranks, stride)
    return gather(size_bytes / ranks, Topology(ranks, per_node if ranks % per_node == 0 else 1)) * 2

"""Bytes that one rank sends in a step, by what they are for and by link, and how K and V travel.

Knows groups of ranks and Megatron-core's collectives. Does not know seconds: `dash_dist.cost_model`
chooses the exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dash_dist.cost_model.exchange import MEMORY_BUDGET, cheapest, expected_busiest, forward_share, predict
from dash_dist.cost_model.links import Links
from dash_dist.cost_model.topology import Topology
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
        name: "selective", "allgather" or "ring"; "halo" of a layer with windows; "none" without context parallelism.
        forward, backward: sent in a forward pass, and in the backward one: K and V again, except those of a halo, and
            their gradients.
        summaries: of chunks, gathered in the forward pass.
        summary_gradients: of what is gathered, returned in the backward pass, where it has any.
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
    summary_gradients: Bytes = Bytes()


NO_EXCHANGE = ExchangePlan("none", Bytes(), Bytes(), Bytes(), 0, 0.0, 0.0, 0.0)


def plan_exchange(
    sizes: Sizes, layout: Layout, machine: Machine, assumptions: Assumptions, summary_vectors: int
) -> ExchangePlan:
    """The exchange that a layer would use: the layout's, or with "auto" the one that the run's rule would choose.

    Args:
        summary_vectors: vectors of a chunk that are gathered for routing.
    """
    if layout.context == 1:
        return NO_EXCHANGE
    topology = cp_topology(layout, machine)
    blocks = sizes.batch * sizes.kv_heads * sizes.chunks
    late_piece = sizes.shard / 2  # of a rank's two in the zigzag layout
    busiest = expected_busiest(blocks, late_piece, topology, partial(shard_coverage, assumptions=assumptions))
    blocks_per_rank = blocks // layout.context
    block_size = 2 * sizes.chunk_size * sizes.head_dim
    costs = predict(
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
        name = cheapest(costs, Links(), MEMORY_BUDGET)
    chosen = costs[name]
    both = Bytes(chosen.fast_bytes, chosen.slow_bytes)
    forward = forward_share(name, layout.context, BF16, FP32)
    shard_summaries = sizes.batch * sizes.chunks / layout.context * sizes.kv * FP32 * summary_vectors
    remote = blocks_per_rank * (layout.context - 1)
    return ExchangePlan(
        name=name,
        forward=both * forward,
        backward=both * (1 - forward),
        summaries=gather(shard_summaries, topology),
        messages=chosen.messages,
        merged=chosen.merged_bytes,
        received={"selective": busiest.held, "allgather": remote + blocks_per_rank, "ring": blocks_per_rank}[name],
        coverage=busiest.held / remote if remote else 0.0,
    )


def plan_halo(sizes: Sizes, layout: Layout, machine: Machine, chunks: int) -> ExchangePlan:
    """The exchange of a layer with windows that reach `chunks` chunks beyond a rank's pieces, in all."""
    topology = cp_topology(layout, machine)
    received = min(chunks, sizes.chunks - sizes.shard // sizes.chunk_size)
    numbers = 2.0 * sizes.batch * received * sizes.chunk_size * sizes.kv

    def sent(size: float) -> Bytes:
        return Bytes(size) if topology.nodes == 1 else Bytes(0.0, size)

    return ExchangePlan(
        name="halo",
        forward=sent(numbers * BF16),
        backward=sent(numbers * FP32),
        summaries=Bytes(),
        messages=2,
        merged=0.0,
        received=float(received * sizes.batch * sizes.kv_heads),
        coverage=received / (sizes.chunks - sizes.shard // sizes.chunk_size),
    )


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

"""The selective exchange: the blocks that routing selected come from their owners, and their gradients go home.

Knows the hops of a plan, on what is computed meanwhile, and the order of sums; does not know how the plan was found,
nor what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from dash_dist.context_parallel import blocks
from dash_dist.context_parallel.flight import Flight, Journey, Sent, Timing, all_to_all
from dash_dist.context_parallel.plan import Plan
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.traffic import Traffic
from dash_kernels.spec import Blocks, Part

KEYS_AND_VALUES, GRADIENTS = "K and V of the selected chunks", "gradients of the selected chunks' K and V"


class BlocksOnTheWay:
    """K and V of the blocks that a rank needs of others."""

    def __init__(self, flight: Flight, plan: Plan):
        self._flight, self._plan = flight, plan

    @property
    def timing(self) -> Timing:
        return self._flight.timing

    def land(self) -> tuple[torch.Tensor, torch.Tensor]:
        """kv [blocks, 2, C, D], contiguous, and the addresses int64 [blocks] of the plan. Call it once.

        Raises ExchangeError when a rank of the group is dead or late.
        """
        return self._flight.land(), self._plan.addresses


class GradientsOnTheWay:
    """Gradients of this rank's own blocks, from the ranks that needed them."""

    def __init__(self, flight: Flight, plan: Plan):
        self._flight, self._plan = flight, plan

    @property
    def timing(self) -> Timing:
        return self._flight.timing

    def land(self, own: torch.Tensor) -> torch.Tensor:
        """Adds them in place to this rank's own share [2, B, S, Hkv, D], contiguous, and returns it. Call it once.

        Always in rank order, so that the result is the same bits in every run. Raises ExchangeError when a rank of the
        group is dead or late.
        """
        return blocks.add(own, self._flight.land(), self._plan.places, self._plan.direct.send)


def fetch(k: torch.Tensor, v: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> BlocksOnTheWay:
    """Starts the exchange of K and V: k, v are this rank's shard [B, S, Hkv, D], strided as they may be.

    A collective call, as is landing: every rank of the group, even one that needs nothing, in the same order.
    """
    return BlocksOnTheWay(Flight(_bring(k, v, plan, shard, sent), (k, v)), plan)


def send_home(gradient: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> GradientsOnTheWay:
    """Starts the way home of gradients [blocks, 2, C, D] of the blocks that `fetch` gave; they travel in their dtype.

    The gradient is contiguous, and is not changed before the landing: it may be what is sent, without a copy.
    A collective call, as is landing: every rank of the group, even one that needed nothing, in the same order.
    """
    return GradientsOnTheWay(Flight(_return(gradient, plan, shard, sent), (gradient,)), plan)


def _bring(k: torch.Tensor, v: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> Journey:
    direct, forwarding = plan.direct, plan.forwarding
    outgoing = blocks.pack(k, v, plan.places, shard.chunk_size)
    if plan.is_idle:
        return outgoing
    arrived = yield from all_to_all(outgoing, direct.send, direct.receive, shard.group, KEYS_AND_VALUES, sent)
    if forwarding is None:
        return arrived
    needed = arrived.new_empty(len(plan.addresses), *arrived.shape[1:])
    forwarded, kept = needed.split([sum(forwarding.hop.receive), len(forwarding.kept)])
    torch.index_select(arrived, 0, forwarding.kept, out=kept)
    outgoing = arrived.index_select(0, forwarding.relayed)
    yield from all_to_all(
        outgoing, forwarding.hop.send, forwarding.hop.receive, shard.group, KEYS_AND_VALUES, sent, into=forwarded
    )
    return needed


def _return(gradient: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> Journey:
    direct, forwarding = plan.direct, plan.forwarding
    if plan.is_idle:
        return gradient
    if forwarding is not None:
        hop = forwarding.hop
        forwarded, kept = gradient.split([sum(hop.receive), len(forwarding.kept)])
        of_neighbours = yield from all_to_all(forwarded, hop.receive, hop.send, shard.group, GRADIENTS, sent)
        gradient = gradient.new_zeros(sum(direct.receive), *gradient.shape[1:])
        gradient.index_copy_(0, forwarding.kept, kept)
        # Rank by rank: no block is there twice in what one rank returns, so that the order of sums is fixed.
        by_rank = zip(forwarding.relayed.split(hop.send), of_neighbours.split(hop.send), strict=True)
        for relayed, returned in by_rank:
            if len(relayed):
                gradient.flatten(1).index_add_(0, relayed, returned.flatten(1))
    return (yield from all_to_all(gradient, direct.receive, direct.send, shard.group, GRADIENTS, sent))


class Selective:
    """An `exchanges.Exchange`: only the blocks of a plan travel, while the rank computes on its own shard."""

    name = "selective"

    def __init__(self, shard: Shard, plan: Plan):
        self._shard, self.plan = shard, plan

    def deliver(self, k: torch.Tensor, v: torch.Tensor, traffic: Traffic) -> SelectiveDelivery:
        return SelectiveDelivery(k, v, self._shard, self.plan, traffic)


class SelectiveDelivery:
    def __init__(self, k: torch.Tensor, v: torch.Tensor, shard: Shard, plan: Plan, traffic: Traffic):
        self._own = Part(k, v, shard.chunks)
        self._shard, self._plan, self._traffic = shard, plan, traffic
        self._remote: Blocks | None = None
        self._on_the_way: BlocksOnTheWay | None = None
        size = plan.sent_bytes(shard.chunk_size, k.shape[-1], k.dtype).total
        traffic.planned(size, dense=2 * k.nbytes * (shard.size - 1))
        if not plan.is_idle:
            self._on_the_way = fetch(k, v, plan, shard, self._sent)
            traffic.under_way(self._on_the_way.timing)

    def parts(self) -> Iterator[tuple[Part | Blocks, bool]]:
        yield self._own, self._plan.is_idle
        if not self._plan.is_idle:
            yield self._landed(), True

    def gradients(self, contribution_to: Callable[[Part | Blocks], torch.Tensor]) -> torch.Tensor:
        going_home = None
        if not self._plan.is_idle:
            gradient = contribution_to(self._landed())
            going_home = send_home(gradient, self._plan, self._shard, self._sent)
            self._traffic.under_way(going_home.timing)
        own = contribution_to(self._own)
        size = self._plan.returned_bytes(self._shard.chunk_size, own.shape[-1], own.dtype).total
        self._traffic.planned(size, dense=own.nbytes * (self._shard.size - 1))
        return own if going_home is None else going_home.land(own)

    def _sent(self, rows: Sequence[int], row_bytes: int) -> None:
        self._traffic.sent_rows(rows, row_bytes, self._shard.rank, self._plan.topology)

    def _landed(self) -> Blocks:
        if self._remote is None:
            assert self._on_the_way is not None
            self._remote = Blocks(*self._on_the_way.land())
            self._on_the_way = None
        return self._remote

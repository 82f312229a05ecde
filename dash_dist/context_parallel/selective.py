"""Selective exchange: the selected blocks come from their owners, and their gradients return to them.

Knows the hops of a plan, the overlap with computation, and the order of sums; does not know how the plan was made, nor
the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from dash_dist.context_parallel import blocks
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.plan import Plan
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.transfer import Sent, Steps, Transfer, all_to_all
from dash_kernels.spec import Blocks, Part

KEYS_AND_VALUES, GRADIENTS = "K and V of the selected chunks", "gradients of the selected chunks' K and V"


def fetch(k: torch.Tensor, v: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> Transfer:
    """Starts the transfer of K and V from this rank's shard k, v [B, S, Hkv, D], with any strides.

    Its result is the blocks of `plan.addresses`, [blocks, 2, C, D], contiguous. A collective call, as is its `wait`:
    every rank of the group, even one that needs nothing, in the same order.
    """
    return Transfer(_fetch_steps(k, v, plan, shard, sent), (k, v))


def send_home(gradient: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> Transfer:
    """Starts the transfer of gradients [blocks, 2, C, D] of the fetched blocks to their owners, in their own dtype.

    Its result is the gradients of this rank's blocks, in rank order: `blocks.add` them at `plan.places` in runs of
    `plan.direct.send`. The gradient is contiguous and stays unchanged until then, since it may be sent without a copy.
    A collective call, as is its `wait`: every rank of the group, even one that needed nothing, in the same order.
    """
    return Transfer(_return_steps(gradient, plan, shard, sent), (gradient,))


def _fetch_steps(k: torch.Tensor, v: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> Steps:
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


def _return_steps(gradient: torch.Tensor, plan: Plan, shard: Shard, sent: Sent) -> Steps:
    direct, forwarding = plan.direct, plan.forwarding
    if plan.is_idle:
        return gradient
    if forwarding is not None:
        hop = forwarding.hop
        forwarded, kept = gradient.split([sum(hop.receive), len(forwarding.kept)])
        returned = yield from all_to_all(forwarded, hop.receive, hop.send, shard.group, GRADIENTS, sent)
        gradient = gradient.new_zeros(sum(direct.receive), *gradient.shape[1:])
        gradient.index_copy_(0, forwarding.kept, kept)
        # One rank returns no block twice. Adding rank by rank therefore fixes the order of sums.
        by_rank = zip(forwarding.relayed.split(hop.send), returned.split(hop.send), strict=True)
        for relayed, contribution in by_rank:
            if len(relayed):
                gradient.flatten(1).index_add_(0, relayed, contribution.flatten(1))
    return (yield from all_to_all(gradient, direct.receive, direct.send, shard.group, GRADIENTS, sent))


class Selective:
    """An `exchange.Exchange` that sends only the blocks of a plan, while the rank computes on its own shard."""

    name = "selective"

    def __init__(self, shard: Shard, plan: Plan):
        self._shard, self.plan = shard, plan

    def deliver(self, k: torch.Tensor, v: torch.Tensor, traffic: Traffic) -> SelectiveDelivery:
        return SelectiveDelivery(k, v, self._shard, self.plan, traffic)


class SelectiveDelivery:
    """An `exchange.Delivery` in two parts: the own shard, then the fetched blocks."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, shard: Shard, plan: Plan, traffic: Traffic):
        self._own = Part(k, v, shard.chunks)
        self._shard, self._plan, self._traffic = shard, plan, traffic
        self._fetched: Blocks | None = None
        self._transfer: Transfer | None = None
        size = plan.sent_bytes(shard.chunk_size, k.shape[-1], k.dtype).total
        traffic.planned(size, dense=2 * k.nbytes * (shard.size - 1))
        if not plan.is_idle:
            self._transfer = fetch(k, v, plan, shard, self._sent)
            traffic.started(self._transfer.timing)

    def parts(self) -> Iterator[tuple[Part | Blocks, bool]]:
        yield self._own, self._plan.is_idle
        if not self._plan.is_idle:
            yield self._blocks(), True

    def gradients(self, contribution_to: Callable[[Part | Blocks], torch.Tensor]) -> torch.Tensor:
        transfer = None
        if not self._plan.is_idle:
            gradient = contribution_to(self._blocks())
            transfer = send_home(gradient, self._plan, self._shard, self._sent)
            self._traffic.started(transfer.timing)
        own = contribution_to(self._own)
        size = self._plan.returned_bytes(self._shard.chunk_size, own.shape[-1], own.dtype).total
        self._traffic.planned(size, dense=own.nbytes * (self._shard.size - 1))
        if transfer is None:
            return own
        return blocks.add(own, transfer.wait(), self._plan.places, self._plan.direct.send)

    def _sent(self, rows: Sequence[int], row_bytes: int) -> None:
        self._traffic.sent_rows(rows, row_bytes, self._shard.rank, self._plan.topology)

    def _blocks(self) -> Blocks:
        if self._fetched is None:
            assert self._transfer is not None
            self._fetched = Blocks(self._transfer.wait(), self._plan.addresses)
            self._transfer = None
        return self._fetched

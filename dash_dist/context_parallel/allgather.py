"""All-gather exchange: every rank gets all of K and V, and the gradients are summed at their owners.

Knows the collectives; does not know the computation in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.plan import Plan
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.transfer import Steps, Transfer
from dash_dist.cost_model.topology import Topology
from dash_kernels.spec import Part

KEYS_AND_VALUES, GRADIENTS = "K and V of all ranks", "gradients of K and V, summed at their owners"


class AllGather:
    """An `exchange.Exchange` that gathers the other shards as one part, while the rank computes on its own."""

    name = "allgather"

    def __init__(self, shard: Shard, topology: Topology, plan: Plan | None = None):
        self._shard, self._topology, self.plan = shard, topology, plan

    def deliver(self, k: torch.Tensor, v: torch.Tensor, traffic: Traffic) -> AllGatherDelivery:
        return AllGatherDelivery(k, v, self._shard, self._topology, traffic)


class AllGatherDelivery:
    """An `exchange.Delivery` in two parts: the own shard, then all others."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, shard: Shard, topology: Topology, traffic: Traffic):
        self._own = Part(k, v, shard.chunks)
        self._shard, self._topology, self._traffic = shard, topology, traffic
        self._gathered: Part | None = None
        self._transfer: Transfer | None = None
        if shard.size > 1:
            self._transfer = Transfer(_gather_steps(k, v, shard), (k, v))
            self._count(2 * k.nbytes, self._transfer)

    def parts(self) -> Iterator[tuple[Part, bool]]:
        yield self._own, self._shard.size == 1
        if self._shard.size > 1:
            yield self._others(), True

    def gradients(self, contribution_to: Callable[[Part], torch.Tensor]) -> torch.Tensor:
        if self._shard.size == 1:
            return contribution_to(self._own)
        gradient = contribution_to(self._others())
        transfer = Transfer(_reduce_steps(gradient, self._shard), (gradient,))
        own = contribution_to(self._own)
        self._count(own.nbytes, transfer)
        return own.add_(transfer.wait())

    def _others(self) -> Part:
        if self._gathered is None:
            assert self._transfer is not None
            keys, values = (x.movedim(0, 1).flatten(1, 2) for x in self._transfer.wait())  # [B, size x S, Hkv, D]
            self._gathered = Part(keys, values, self._shard.other_chunks)
            self._transfer = None
        return self._gathered

    def _count(self, shard_bytes: int, transfer: Transfer) -> None:
        """Counts one shard sent to, or for, every other rank."""
        size = self._shard.size
        self._traffic.sent_rows([1] * size, shard_bytes, self._shard.rank, self._topology)
        self._traffic.planned(shard_bytes * (size - 1), dense=shard_bytes * (size - 1))
        self._traffic.started(transfer.timing)


def _gather_steps(k: torch.Tensor, v: torch.Tensor, shard: Shard) -> Steps:
    """K and V of every rank, [2, size, B, S, Hkv, D]. Two collectives: a batch of 1 then needs no further copy."""
    gathered = k.new_empty(2, shard.size, *k.shape)
    with exchange_errors(shard.group, KEYS_AND_VALUES):
        works = [
            dist.all_gather_into_tensor(into.flatten(0, 1), own.contiguous(), group=shard.group, async_op=True)
            for into, own in zip(gathered, (k, v), strict=True)
        ]
    yield
    with exchange_errors(shard.group, KEYS_AND_VALUES):
        for work in works:
            work.wait()
    return gathered


def _reduce_steps(gradient: torch.Tensor, shard: Shard) -> Steps:
    """From [2, B, size x S, Hkv, D] this rank's shard [2, B, S, Hkv, D], summed over the ranks."""
    by_rank = gradient.unflatten(2, (shard.size, -1)).movedim(2, 1).contiguous()  # a copy unless the batch is 1
    own = by_rank.new_empty(2, *by_rank.shape[2:])
    with exchange_errors(shard.group, GRADIENTS):
        works = [
            dist.reduce_scatter_tensor(into, contribution.flatten(0, 1), group=shard.group, async_op=True)
            for into, contribution in zip(own, by_rank, strict=True)
        ]
    yield
    with exchange_errors(shard.group, GRADIENTS):
        for work in works:
            work.wait()
    return own

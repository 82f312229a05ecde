"""The all-gather exchange: every rank gets all of K and V, and its gradients of them are summed at their owners.

Knows the collectives; does not know what is computed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import naming_the_exchange
from dash_dist.context_parallel.flight import Flight, Journey
from dash_dist.context_parallel.plan import Plan
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.topology import Topology
from dash_dist.context_parallel.traffic import Traffic
from dash_kernels.spec import Part

KEYS_AND_VALUES, GRADIENTS = "K and V of all ranks", "gradients of K and V, summed at their owners"


class AllGather:
    """An `exchanges.Exchange`: the other shards come as one part, while the rank computes on its own."""

    name = "allgather"

    def __init__(self, shard: Shard, topology: Topology, plan: Plan | None = None):
        self._shard, self._topology, self.plan = shard, topology, plan

    def deliver(self, k: torch.Tensor, v: torch.Tensor, traffic: Traffic) -> AllGatherDelivery:
        return AllGatherDelivery(k, v, self._shard, self._topology, traffic)


class AllGatherDelivery:
    def __init__(self, k: torch.Tensor, v: torch.Tensor, shard: Shard, topology: Topology, traffic: Traffic):
        self._own = Part(k, v, shard.chunks)
        self._shard, self._topology, self._traffic = shard, topology, traffic
        self._others: Part | None = None
        self._flight: Flight | None = None
        if shard.size > 1:
            self._flight = Flight(_gather(k, v, shard), (k, v))
            self._count(2 * k.nbytes, self._flight)

    def parts(self) -> Iterator[tuple[Part, bool]]:
        yield self._own, self._shard.size == 1
        if self._shard.size > 1:
            yield self._landed(), True

    def gradients(self, contribution_to: Callable[[Part], torch.Tensor]) -> torch.Tensor:
        if self._shard.size == 1:
            return contribution_to(self._own)
        of_others = contribution_to(self._landed())
        flight = Flight(_reduce_to_owners(of_others, self._shard), (of_others,))
        own = contribution_to(self._own)
        self._count(own.nbytes, flight)
        return own.add_(flight.land())

    def _landed(self) -> Part:
        if self._others is None:
            assert self._flight is not None
            keys, values = (x.movedim(0, 1).flatten(1, 2) for x in self._flight.land())  # [B, size x S, Hkv, D]
            self._others = Part(keys, values, self._shard.other_chunks)
            self._flight = None
        return self._others

    def _count(self, shard_bytes: int, flight: Flight) -> None:
        """A rank sends one shard to every other rank, or for every other rank."""
        size = self._shard.size
        self._traffic.sent_rows([1] * size, shard_bytes, self._shard.rank, self._topology)
        self._traffic.planned(shard_bytes * (size - 1), dense=shard_bytes * (size - 1))
        self._traffic.under_way(flight.timing)


def _gather(k: torch.Tensor, v: torch.Tensor, shard: Shard) -> Journey:
    """K and V of every rank, [2, size, B, S, Hkv, D]: K by itself, so that a batch of 1 need not be copied again."""
    gathered = k.new_empty(2, shard.size, *k.shape)
    with naming_the_exchange(shard.group, KEYS_AND_VALUES):
        works = [
            dist.all_gather_into_tensor(into.flatten(0, 1), own.contiguous(), group=shard.group, async_op=True)
            for into, own in zip(gathered, (k, v), strict=True)
        ]
    yield
    with naming_the_exchange(shard.group, KEYS_AND_VALUES):
        for work in works:
            work.wait()
    return gathered


def _reduce_to_owners(of_others: torch.Tensor, shard: Shard) -> Journey:
    """From [2, B, size x S, Hkv, D] this rank's part [2, B, S, Hkv, D], summed over the ranks."""
    by_rank = of_others.unflatten(2, (shard.size, -1)).movedim(2, 1).contiguous()  # a copy unless the batch is 1
    own = by_rank.new_empty(2, *by_rank.shape[2:])
    with naming_the_exchange(shard.group, GRADIENTS):
        works = [
            dist.reduce_scatter_tensor(into, gradient.flatten(0, 1), group=shard.group, async_op=True)
            for into, gradient in zip(own, by_rank, strict=True)
        ]
    yield
    with naming_the_exchange(shard.group, GRADIENTS):
        for work in works:
            work.wait()
    return own

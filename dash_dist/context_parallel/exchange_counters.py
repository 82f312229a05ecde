"""Counters of exchanges: bytes sent, blocks needed and seconds waited, summed over calls until they are taken.

Knows bytes, transfers and counts of one rank; does not know layers, steps, nor other ranks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dash_dist.context_parallel.plan import Plan
from dash_dist.context_parallel.transfer import Timing
from dash_dist.cost_model.topology import Topology


@dataclass(frozen=True)
class TrafficSummary:
    """Counters of one rank over the calls since the last `take`, forward and backward.

    planned_bytes:    bytes of K, V and gradients this rank had to send by its plans; without a plan, by its exchange.
    sent_bytes:       bytes it sent to other ranks.
    slow_link_bytes:  share of them that crossed the links between nodes.
    dense_bytes:      bytes that an exchange of everything with everybody would have sent.
    needed_blocks, reachable_blocks: blocks of other ranks that plans asked for, and that they could have asked for.
    transfer_seconds: total duration of the transfers.
    waited_seconds:   time this rank waited for them without computing.
    work:             int64 [chunks of the shard], CPU: chunks selected by its tokens in forward passes, summed over
                      batch, tokens and KV heads; empty without routing. See `layout.imbalance`.
    exchanges:        name -> forward passes; those of window attention as "halo".
    """

    planned_bytes: int
    sent_bytes: int
    slow_link_bytes: int
    dense_bytes: int
    needed_blocks: int
    reachable_blocks: int
    transfer_seconds: float
    waited_seconds: float
    work: torch.Tensor
    exchanges: Mapping[str, int]

    @property
    def coverage(self) -> float | None:
        """Needed / reachable blocks, over the union of the queries' selections. None without a plan."""
        return self.needed_blocks / self.reachable_blocks if self.reachable_blocks else None

    @property
    def overlap(self) -> float | None:
        """Share of the transfers' time in which the rank computed. None without a transfer."""
        return max(0.0, 1.0 - self.waited_seconds / self.transfer_seconds) if self.transfer_seconds else None


class Traffic:
    """Sums the counters. Only `take` waits for the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Resets all counters."""
        self._bytes: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()
        self._pending: deque[tuple[Timing, bool]] = deque()  # times not known yet; True: in a backward pass
        self._transfer_seconds = 0.0
        self._waited_seconds = {False: 0.0, True: 0.0}  # keys as in _pending
        self._work: torch.Tensor | None = None
        self._exchanges: Counter[str] = Counter()

    def planned(self, size: int, *, dense: int) -> None:
        """Adds the bytes of one transfer, and those of a dense exchange in its place."""
        self._bytes.update(planned=size, dense=dense)

    def sent_rows(self, rows: Sequence[int], row_bytes: int, rank: int, topology: Topology) -> None:
        """Adds rows[r] rows sent to rank r; rows to this rank itself do not count."""
        near = topology.node_ranks(rank)
        within = sum(rows[near.start : near.stop]) - rows[rank]
        across = sum(rows) - rows[rank] - within
        self._bytes.update(sent=(within + across) * row_bytes, slow=across * row_bytes)

    def started(self, timing: Timing) -> None:
        """Adds a transfer whose times will be known later."""
        self._settle()
        in_backward = torch._C._current_graph_task_id() != -1  # a recomputed forward pass counts as backward
        self._pending.append((timing, in_backward))

    def call(self, exchange: str, selected: torch.Tensor, chunks: int, plan: Plan | None) -> None:
        """Adds one forward pass over a shard of complete chunks; selected is `Routing.selected`."""
        self._exchanges[exchange] += 1
        work = selected.unflatten(1, (chunks, -1)).sum((0, 2, 3), dtype=torch.int64)
        self._work = work if self._work is None else self._work + work
        if plan is not None:
            self._blocks.update(needed=len(plan.addresses), reachable=plan.reachable)

    def halo(self) -> None:
        """Adds one forward pass of window attention."""
        self._exchanges["halo"] += 1

    def waited(self) -> tuple[float, float]:
        """Seconds waited in forward and in backward passes, over transfers whose times are known. Does not wait."""
        self._settle()
        return self._waited_seconds[False], self._waited_seconds[True]

    def take(self) -> TrafficSummary:
        """Returns the counters since the last `take` and resets them; waits for the device."""
        work = torch.empty(0, dtype=torch.int64) if self._work is None else self._work.cpu()  # waits
        self._settle()
        summary = TrafficSummary(
            planned_bytes=self._bytes["planned"],
            sent_bytes=self._bytes["sent"],
            slow_link_bytes=self._bytes["slow"],
            dense_bytes=self._bytes["dense"],
            needed_blocks=self._blocks["needed"],
            reachable_blocks=self._blocks["reachable"],
            transfer_seconds=self._transfer_seconds,
            waited_seconds=sum(self._waited_seconds.values()),
            work=work,
            exchanges=dict(self._exchanges),
        )
        self.clear()
        return summary

    def _settle(self) -> None:
        """Adds the transfers that are over, so that counters that are never taken do not grow. Does not wait."""
        while self._pending and self._pending[0][0].is_known():
            timing, in_backward = self._pending.popleft()
            transfer, waited = timing.seconds()
            self._transfer_seconds += transfer
            self._waited_seconds[in_backward] += waited

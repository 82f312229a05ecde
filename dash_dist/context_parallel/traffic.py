"""What exchanges moved and how long ranks waited for it, added up over calls until somebody asks.

Knows bytes, flights and counts of one rank; does not know layers, steps, nor other ranks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dash_dist.context_parallel.flight import Timing
from dash_dist.context_parallel.plan import Plan
from dash_dist.context_parallel.topology import Topology


@dataclass(frozen=True)
class TrafficSummary:
    """Of one rank, over the calls since the last `take`, forward and backward.

    planned_bytes:    K, V and gradients that the plans had this rank send; of exchanges without one, what they send.
    sent_bytes:       what it did send to other ranks.
    slow_link_bytes:  the part of it that crossed the links between nodes.
    dense_bytes:      what an exchange of everything with everybody would have sent.
    needed_blocks, reachable_blocks: blocks of other ranks that plans asked for, and that they could have asked for.
    flight_seconds:   how long tensors were under way.
    waited_seconds:   how long this rank waited for them with nothing else to do.
    work:             int64 [chunks of the shard], CPU: chunks that its tokens selected in forward passes, summed over
                      batch, tokens and KV heads; empty before the first call. See `layout.imbalance`.
    exchanges:        name -> forward passes.
    """

    planned_bytes: int
    sent_bytes: int
    slow_link_bytes: int
    dense_bytes: int
    needed_blocks: int
    reachable_blocks: int
    flight_seconds: float
    waited_seconds: float
    work: torch.Tensor
    exchanges: Mapping[str, int]

    @property
    def coverage(self) -> float | None:
        """Needed / reachable blocks: the union of what the rank's queries select. None where no plan was made."""
        return self.needed_blocks / self.reachable_blocks if self.reachable_blocks else None

    @property
    def overlap(self) -> float | None:
        """Share of the flights' time in which the rank had something to compute. None where nothing travelled."""
        return max(0.0, 1.0 - self.waited_seconds / self.flight_seconds) if self.flight_seconds else None


class Traffic:
    """Adds up; no method but `take` waits for the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._bytes: Counter[str] = Counter()
        self._blocks: Counter[str] = Counter()
        self._flights: deque[tuple[Timing, bool]] = deque()  # whose times are not known yet; in a backward pass?
        self._flight_seconds = 0.0
        self._waited_seconds = {False: 0.0, True: 0.0}  # in forward passes, in backward ones
        self._work: torch.Tensor | None = None
        self._exchanges: Counter[str] = Counter()

    def planned(self, size: int, *, dense: int) -> None:
        """Bytes of one flight, and of the flight of everything to everybody in its place."""
        self._bytes.update(planned=size, dense=dense)

    def sent_rows(self, rows: Sequence[int], row_bytes: int, rank: int, topology: Topology) -> None:
        """rows[r] rows left this rank for rank r; what a rank keeps is not sent."""
        near = topology.node_ranks(rank)
        within = sum(rows[near.start : near.stop]) - rows[rank]
        across = sum(rows) - rows[rank] - within
        self._bytes.update(sent=(within + across) * row_bytes, slow=across * row_bytes)

    def under_way(self, timing: Timing) -> None:
        self._settle()
        in_backward = torch._C._current_graph_task_id() != -1  # where a recomputed forward pass belongs as well
        self._flights.append((timing, in_backward))

    def call(self, exchange: str, selected: torch.Tensor, chunks: int, plan: Plan | None) -> None:
        """One forward pass over a shard of complete chunks; selected is `Routing.selected`."""
        self._exchanges[exchange] += 1
        work = selected.unflatten(1, (chunks, -1)).sum((0, 2, 3), dtype=torch.int64)
        self._work = work if self._work is None else self._work + work
        if plan is not None:
            self._blocks.update(needed=len(plan.addresses), reachable=plan.reachable)

    def waited(self) -> tuple[float, float]:
        """Seconds waited in forward and in backward passes, of the flights whose times are known. Does not wait."""
        self._settle()
        return self._waited_seconds[False], self._waited_seconds[True]

    def take(self) -> TrafficSummary:
        """What was added since the last call of it; waits for the device."""
        work = torch.empty(0, dtype=torch.int64) if self._work is None else self._work.cpu()  # waits
        self._settle()
        summary = TrafficSummary(
            planned_bytes=self._bytes["planned"],
            sent_bytes=self._bytes["sent"],
            slow_link_bytes=self._bytes["slow"],
            dense_bytes=self._bytes["dense"],
            needed_blocks=self._blocks["needed"],
            reachable_blocks=self._blocks["reachable"],
            flight_seconds=self._flight_seconds,
            waited_seconds=sum(self._waited_seconds.values()),
            work=work,
            exchanges=dict(self._exchanges),
        )
        self.clear()
        return summary

    def _settle(self) -> None:
        """Adds up the flights that are over, so that what nobody asks for does not pile up. Does not wait."""
        while self._flights and self._flights[0][0].is_known():
            timing, in_backward = self._flights.popleft()
            flight, waited = timing.seconds()
            self._flight_seconds += flight
            self._waited_seconds[in_backward] += waited

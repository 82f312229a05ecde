"""Interface of an exchange: the way K and V travel between the ranks of a group.

Knows what the attention asks of an exchange; does not know how tensors move, as `ring`, `allgather` and `selective` do,
nor which of them a call takes, as `choice` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.plan import Plan
from dash_kernels.spec import Blocks, Part

EXCHANGES = ("auto", "selective", "allgather", "ring")


class Delivery(Protocol):
    """K and V of one pass, forward or backward. Every method is a collective call."""

    def parts(self) -> Iterator[tuple[Part | Blocks, bool]]:
        """Yields K and V part by part, each with True if it is the last; the rank's own chunks are in the first one.

        The next part travels while the caller uses the current one. May be called again.
        """
        ...

    def gradients(self, contribution_to: Callable[[Part | Blocks], torch.Tensor]) -> torch.Tensor:
        """Gradient [2, B, S, Hkv, D] of this rank's k and v, summed over the queries of all ranks.

        contribution_to(part) returns the gradient of a part over this rank's queries, in the shape of the part. It is
        called once per part.
        """
        ...


class Exchange(Protocol):
    """Way of K and V for one call. Holds no K or V, so forward, backward and recomputation share it.

    plan: blocks that each rank needs; None if the exchange was chosen without a plan.
    """

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> Plan | None: ...

    def deliver(self, k: torch.Tensor, v: torch.Tensor, traffic: Traffic) -> Delivery:
        """Starts one pass over this rank's shard k, v [B, S, Hkv, D]. A collective call."""
        ...


def check_exchange(exchange: str) -> None:
    """Raises ValueError for an unknown name."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}: give one of {', '.join(EXCHANGES)}")

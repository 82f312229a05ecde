"""The ways that K and V travel, behind one interface, and the choice of one.

`ring`, `allgather` and `selective` know how tensors move; what is computed when which of them is there: `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from dash_dist.context_parallel import cost
from dash_dist.context_parallel.allgather import AllGather
from dash_dist.context_parallel.plan import Plan, make_plan
from dash_dist.context_parallel.ring import Ring
from dash_dist.context_parallel.selective import Selective
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.topology import Topology
from dash_dist.context_parallel.traffic import Traffic
from dash_kernels.spec import Blocks, Part, accumulation_dtype

EXCHANGES = ("auto", "selective", "allgather", "ring")


class Delivery(Protocol):
    """K and V of one pass, forward or backward. Every method is a collective call."""

    def parts(self) -> Iterator[tuple[Part | Blocks, bool]]:
        """What the rank's queries may attend to, part by part, with whether it is the last; the rank's own chunks are
        in the first one. What comes next is under way while the caller uses a part. May be called again.
        """
        ...

    def gradients(self, contribution_to: Callable[[Part | Blocks], torch.Tensor]) -> torch.Tensor:
        """Gradient [2, B, S, Hkv, D] of this rank's k and v, summed over all ranks' queries.

        contribution_to(part) gives what this rank's queries add to the gradient of a part, like the part; it is called
        once for each.
        """
        ...


class Exchange(Protocol):
    """How K and V of one call travel: holds no tensor of them, so that forward, backward and recomputation share it.

    plan: of what was selected; None where the exchange was chosen without one.
    """

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> Plan | None: ...

    def deliver(self, k: torch.Tensor, v: torch.Tensor, traffic: Traffic) -> Delivery:
        """k, v: this rank's shard [B, S, Hkv, D]. A collective call."""
        ...


def check_exchange(exchange: str) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}: give one of {', '.join(EXCHANGES)}")


def of_everything(name: str, shard: Shard, topology: Topology, plan: Plan | None = None) -> Exchange | None:
    """The exchange, where it does not depend on what was selected."""
    if name == "ring":
        return Ring(shard, topology, plan)
    return AllGather(shard, topology, plan) if name == "allgather" else None


def from_plan(
    name: str, reached: torch.Tensor, k: torch.Tensor, group: int, shard: Shard, topology: Topology
) -> Exchange:
    """The selective exchange of what was `reached` (bool [B, Hkv, n]) or, for "auto", the one that `cost` prefers for
    `group` query heads of a KV head.
    """
    plan = make_plan(reached, shard, topology)
    if name == "auto":
        costs = cost.predict(
            plan.busiest,
            topology,
            blocks_per_rank=reached.shape[0] * reached.shape[1] * shard.chunks_per_rank,
            block_size=2 * shard.chunk_size * k.shape[-1],
            element_size=k.element_size(),
            gradient_element_size=accumulation_dtype(k.dtype).itemsize,
            group=group,
            planned=True,
        )
        other = of_everything(cost.cheapest(costs, cost.Links(), cost.MEMORY_BUDGET), shard, topology, plan)
        if other is not None:
            return other
    return Selective(shard, plan)

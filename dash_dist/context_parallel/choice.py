"""Choice of the exchange of a call, before routing where its name allows it, after planning otherwise.

Knows names and predicted costs; does not know how tensors move.
"""

from __future__ import annotations

import torch

from dash_dist.context_parallel.allgather import AllGather
from dash_dist.context_parallel.exchange import Exchange
from dash_dist.context_parallel.plan import Plan, make_plan
from dash_dist.context_parallel.ring import Ring
from dash_dist.context_parallel.selective import Selective
from dash_dist.context_parallel.shard import Shard
from dash_dist.cost_model.exchange import MEMORY_BUDGET, cheapest, predict
from dash_dist.cost_model.links import Links
from dash_dist.cost_model.topology import Topology
from dash_kernels.spec import accumulation_dtype


def static_exchange(name: str, shard: Shard, topology: Topology, plan: Plan | None = None) -> Exchange | None:
    """The exchange if it sends everything whatever routing selects; None for "selective" and "auto"."""
    if name == "ring":
        return Ring(shard, topology, plan)
    return AllGather(shard, topology, plan) if name == "allgather" else None


def planned_exchange(
    name: str, reached: torch.Tensor, k: torch.Tensor, group: int, shard: Shard, topology: Topology
) -> Exchange:
    """The selective exchange of the selected chunks, or, for "auto", the exchange with the lowest predicted cost.

    reached is bool [B, Hkv, n], the chunks that queries of this rank selected; `group` query heads share a KV head.
    """
    plan = make_plan(reached, shard, topology)
    if name == "auto":
        costs = predict(
            plan.busiest,
            topology,
            blocks_per_rank=reached.shape[0] * reached.shape[1] * shard.chunks_per_rank,
            block_size=2 * shard.chunk_size * k.shape[-1],
            element_size=k.element_size(),
            gradient_element_size=accumulation_dtype(k.dtype).itemsize,
            group=group,
            planned=True,
        )
        other = static_exchange(cheapest(costs, Links(), MEMORY_BUDGET), shard, topology, plan)
        if other is not None:
            return other
    return Selective(shard, plan)

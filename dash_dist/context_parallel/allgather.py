"""The all-gather exchange: every rank gets all of K and V, and its gradients of them are summed at their owners.

Knows the collectives; does not know what is computed in between.
"""

from __future__ import annotations

import torch

from dash_dist.context_parallel.shard import Shard, gather_shards, reduce_to_owners
from dash_kernels.spec import Part


def gather(k: torch.Tensor, v: torch.Tensor, shard: Shard) -> Part:
    """The whole sequence, in rank order, from every rank's k and v [B, S, Hkv, D]."""
    by_rank = gather_shards(torch.stack((k, v)), shard.group)  # [size, 2, B, S, Hkv, D]
    keys, values = by_rank.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
    return Part(keys, values, shard.gathered_chunks, whole=True)


def reduce(contribution: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Gradient [2, B, S, Hkv, D] of this rank's k and v, from every rank's [2, B, size x S, Hkv, D] of all of them."""
    return reduce_to_owners(contribution.unflatten(2, (shard.size, -1)).movedim(2, 0), shard.group)

"""The all-gather exchange: every rank holds all of K and V while it computes. Same two functions as `ring`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from dash_dist.context_parallel.shard import Shard, gather_shards, reduce_to_owners
from dash_kernels.spec import ChunkIds


def parts(k: torch.Tensor, v: torch.Tensor, shard: Shard) -> Iterator[tuple[ChunkIds, torch.Tensor, torch.Tensor]]:
    """One part: (chunk ids, k, v) of the whole sequence, in rank order."""
    by_rank = gather_shards(torch.stack((k, v)), shard.group)  # [size, 2, B, S, Hkv, D]
    keys, values = by_rank.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
    ids = itertools.chain.from_iterable(shard.chunks_of(rank).ids for rank in range(shard.size))
    yield ChunkIds(list(ids)), keys, values


def backward(
    k: torch.Tensor,
    v: torch.Tensor,
    shard: Shard,
    compute: Callable[[ChunkIds, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Gradient [2, *k.shape] of this rank's k and v; K and V are gathered again rather than kept since the forward."""
    ((chunks, keys, values),) = parts(k, v, shard)
    contribution = compute(chunks, keys, values)  # [2, B, size x S, Hkv, D]
    return reduce_to_owners(contribution.unflatten(2, (shard.size, -1)).movedim(2, 0), shard.group)

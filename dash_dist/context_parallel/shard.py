"""A rank's shard: its place in the group and the collectives on chunk summaries. Does not know how K and V travel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dash_dist.context_parallel.layout import gathered_chunks, shard_chunks
from dash_kernels.chunks import ChunkGrid


@dataclass(frozen=True)
class Shard:
    """The part of a sequence of size x chunks_per_rank complete chunks that this rank of the group holds."""

    group: dist.ProcessGroup
    layout: str
    chunks_per_rank: int
    chunk_size: int

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def chunks(self) -> ChunkGrid:
        return self.chunks_of(self.rank)

    @property
    def gathered_chunks(self) -> ChunkGrid:
        """The chunks of all shards, in rank order."""
        return gathered_chunks(self.chunks_per_rank, self.chunk_size, self.size, self.layout)

    def chunks_of(self, rank: int) -> ChunkGrid:
        return shard_chunks(self.chunks_per_rank, self.chunk_size, rank, self.size, self.layout)

    def gather_summaries(self, summaries: torch.Tensor) -> torch.Tensor:
        """[B, chunks_per_rank, Hkv, D] of this shard -> [B, n, Hkv, D] of the whole sequence, by chunk id."""
        in_rank_order = gather_shards(summaries, self.group).transpose(0, 1).flatten(1, 2)
        slots = self.gathered_chunks.slots_by_id(in_rank_order.shape[1], summaries.device)
        return in_rank_order[:, slots].contiguous()

    def reduce_summary_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Sums [B, n, Hkv, D] over the group; every rank gets its own chunks' part [B, chunks_per_rank, Hkv, D]."""
        ids = self.gathered_chunks.on(gradient.device)[0]
        by_rank = gradient[:, ids].unflatten(1, (self.size, -1)).transpose(0, 1)
        return reduce_to_owners(by_rank, self.group)


def gather_shards(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x of every rank, [size, *x.shape]."""
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered


def reduce_to_owners(by_rank: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """by_rank [size, ...] summed over the group; rank r gets entry r."""
    own = by_rank.new_empty(by_rank.shape[1:])
    dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1).contiguous(), group=group)
    return own

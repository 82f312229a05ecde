"""Shard of a rank: its chunks, and the all-gather of chunk summaries.

Knows the group and the layout; does not know how K and V travel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors
from dash_dist.context_parallel.layout import gathered_chunks, other_chunks, shard_chunks
from dash_kernels.chunks import ChunkGrid


@dataclass(frozen=True)
class Shard:
    """This rank's share of a sequence of complete chunks.

    sequence: all chunks of the sequence, in order.
    """

    group: dist.ProcessGroup
    layout: str
    sequence: ChunkGrid
    chunk_size: int

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def chunks_per_rank(self) -> int:
        return len(self.sequence) // self.size

    @property
    def chunks(self) -> ChunkGrid:
        return self.chunks_of(self.rank)

    @property
    def gathered_chunks(self) -> ChunkGrid:
        """Chunks of all shards, in rank order."""
        return gathered_chunks(self.sequence, self.size, self.layout)

    @property
    def other_chunks(self) -> ChunkGrid:
        """`gathered_chunks` without those of this rank."""
        return other_chunks(self.sequence, self.rank, self.size, self.layout)

    def chunks_of(self, rank: int) -> ChunkGrid:
        return shard_chunks(self.sequence, rank, self.size, self.layout)

    def gather_summaries(self, summaries: torch.Tensor) -> torch.Tensor:
        """Gathers [B, chunks_per_rank, Hkv, D] of this shard into [B, n, Hkv, D] of the whole sequence, by chunk id."""
        with exchange_errors(self.group, "the summaries of all chunks"):
            in_rank_order = gather_shards(summaries, self.group).transpose(0, 1).flatten(1, 2)
        slots = self.gathered_chunks.slots_by_id(in_rank_order.shape[1], summaries.device)
        return in_rank_order[:, slots].contiguous()


def gather_shards(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gathers x of every rank, [size, *x.shape]."""
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered

"""Shard of a rank: its chunks, whole ones of a sequence, and the all-gather of chunk summaries.

Knows the group and the layout; does not know how K and V travel.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors
from dash_dist.context_parallel.layout import gathered_chunks, other_chunks, pieces_of, shard_chunks
from dash_kernels.arguments import sequence_chunks
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec


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


def whole_chunks(
    q: torch.Tensor,
    chunks: ChunkGrid | None,
    cu_seqlens: torch.Tensor | None,
    spec: AttentionSpec,
    size: int,
    layout: str,
) -> ChunkGrid:
    """All chunks of the sequence that q is a shard of. Raises ValueError if a piece or document is not whole chunks."""
    seq_len, chunk_size = q.shape[1] * size, spec.chunk_size
    own, pieces = pieces_of(0, size, layout)
    if seq_len % (pieces * chunk_size):
        unit = pieces * chunk_size
        factors = f"{f'{len(own)} x ' if len(own) > 1 else ''}cp x chunk_size"
        raise ValueError(
            f"sequence length {seq_len} is not a multiple of {factors} = {unit}: pad to {-(-seq_len // unit) * unit}"
        )
    sequence = sequence_chunks(chunks, cu_seqlens, q, seq_len, spec)
    if not sequence.complete_to(chunk_size):
        slot = int((sequence.lengths < chunk_size).nonzero()[0])
        end = int(sequence.starts[slot] + sequence.lengths[slot])
        raise ValueError(
            f"cu_seqlens has a document that ends at token {end} with a chunk of {int(sequence.lengths[slot])} tokens: "
            f"with a context-parallel group, pad every document to a multiple of chunk_size = {chunk_size}"
        )
    return sequence


@functools.lru_cache(maxsize=64)
def fingerprint(sequence: ChunkGrid) -> str:
    """Hash of the documents' borders."""
    return hashlib.sha1(sequence.firsts.numpy().tobytes()).hexdigest()

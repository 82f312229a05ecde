"""Layouts: the chunks of the sequence that each rank's shard holds, and moving a sequence in and out of shards.

Knows ranks and chunk ids; does not know attention. In the contiguous layout rank r holds piece r of size pieces. In the
zigzag layout the sequence is cut into 2 x size pieces and rank r holds pieces r and 2 x size - 1 - r. That pairs early
(cheap) with late (expensive) queries. The double zigzag layout pairs the pieces of either half of the sequence. It
balances work that levels off with the position two to four times as well.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist

from dash_dist.config.attention import PIECES_PER_RANK
from dash_kernels.chunks import ChunkGrid

LAYOUTS = tuple(PIECES_PER_RANK)


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: give one of {', '.join(LAYOUTS)}")


def pieces_of(rank: int, size: int, layout: str) -> tuple[list[int], int]:
    """Pieces of a rank, in shard order, and the number of pieces of the sequence."""
    check_layout(layout)
    count = PIECES_PER_RANK[layout]
    if count == 1 or size == 1:
        return [rank], size
    # There and back again: 0 1 2 3 3 2 1 0 for four ranks.
    pairs = range(0, count * size, 2 * size)
    return [piece for first in pairs for piece in (first + rank, first + 2 * size - 1 - rank)], count * size


@functools.lru_cache(maxsize=256)
def shard_chunks(sequence: ChunkGrid, rank: int, size: int, layout: str) -> ChunkGrid:
    """Chunks of a rank, in shard order. Raises ValueError if a piece is not whole chunks."""
    return sequence.take(_chunk_ids(len(sequence), rank, size, layout))


@functools.lru_cache(maxsize=64)
def gathered_chunks(sequence: ChunkGrid, size: int, layout: str) -> ChunkGrid:
    """Chunks of all shards, in rank order. Raises ValueError if a piece is not whole chunks."""
    ids = [_chunk_ids(len(sequence), rank, size, layout) for rank in range(size)]
    return sequence.take(list(itertools.chain.from_iterable(ids)))


@functools.lru_cache(maxsize=64)
def other_chunks(sequence: ChunkGrid, rank: int, size: int, layout: str) -> ChunkGrid:
    """`gathered_chunks` without those of a rank, at their offsets in the tensor that holds all of them."""
    slots = len(sequence) // size
    return gathered_chunks(sequence, size, layout).without(rank * slots, (rank + 1) * slots)


def _chunk_ids(chunks: int, rank: int, size: int, layout: str) -> list[int]:
    pieces, count = pieces_of(rank, size, layout)
    if chunks % count:
        raise ValueError(
            f"a sequence of {chunks} chunks cannot be cut into {count} pieces of whole chunks for layout {layout!r} at "
            f"context-parallel size {size}: pad it to {-(-chunks // count) * count} chunks or use layout 'contiguous'"
        )
    length = chunks // count
    return [piece * length + offset for piece in pieces for offset in range(length)]


def imbalance(work: torch.Tensor, size: int, layout: str) -> float:
    """Largest / mean work of a rank under a layout, from the work [n] of each chunk of the sequence.

    A step takes as long as its busiest rank. 1 without work. Raises ValueError if a piece is not whole chunks.
    """
    by_rank = torch.stack([work[_chunk_ids(len(work), rank, size, layout)].sum() for rank in range(size)]).double()
    return float(by_rank.max() / by_rank.mean()) if by_rank.any() else 1.0


def imbalance_by_layout(work: torch.Tensor, size: int) -> dict[str, float]:
    """`imbalance` of every layout whose pieces are whole chunks."""
    possible = (layout for layout in LAYOUTS if len(work) % pieces_of(0, size, layout)[1] == 0)
    return {layout: imbalance(work, size, layout) for layout in possible}


def shard_positions(seq_len: int, rank: int, size: int, layout: str = "zigzag") -> torch.Tensor:
    """Positions in the sequence of a shard's tokens, int64 [seq_len / size], in shard order.

    Raises ValueError if seq_len is not a multiple of the number of pieces.
    """
    pieces, count = pieces_of(rank, size, layout)
    if seq_len % count:
        raise ValueError(
            f"sequence length {seq_len} is not a multiple of {count}, the pieces of layout {layout!r} at "
            f"context-parallel size {size}: pad to {-(-seq_len // count) * count}"
        )
    length = seq_len // count
    return torch.cat([torch.arange(piece * length, (piece + 1) * length) for piece in pieces])


def split_sequence(
    x: torch.Tensor, group: dist.ProcessGroup | None, *, layout: str = "zigzag", dim: int = 1
) -> torch.Tensor:
    """Cuts this rank's shard from x, which every rank of the group holds whole; returns x itself without a group.

    The gradient of x is gathered: every rank gets all of it, as for a loss that is the sum of the ranks' losses.
    """
    check_layout(layout)
    return x if group is None else _Split.apply(x, group, layout, dim)


def join_sequence(
    x: torch.Tensor, group: dist.ProcessGroup | None, *, layout: str = "zigzag", dim: int = 1
) -> torch.Tensor:
    """Gathers the whole sequence on every rank from shards of equal shape; returns x itself without a group.

    Inverse of `split_sequence`. The gradient of x is this rank's shard of the gradient of the result, as for a loss
    that every rank computes from the whole sequence and that counts once.
    """
    check_layout(layout)
    return x if group is None else _Join.apply(x, group, layout, dim)


def _split(x: torch.Tensor, group: dist.ProcessGroup, layout: str, dim: int) -> torch.Tensor:
    positions = shard_positions(x.shape[dim], dist.get_rank(group), dist.get_world_size(group), layout)
    return x.index_select(dim, positions.to(x.device))


def _join(x: torch.Tensor, group: dist.ProcessGroup, layout: str, dim: int) -> torch.Tensor:
    size = dist.get_world_size(group)
    shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(shards, x.contiguous(), group=group)
    length = x.shape[dim] * size
    positions = torch.cat([shard_positions(length, rank, size, layout) for rank in range(size)])
    return torch.cat(shards, dim).index_select(dim, positions.argsort().to(x.device))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, layout: str, dim: int) -> torch.Tensor:
        ctx.call = group, layout, dim
        return _split(x, group, layout, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _join(grad, *ctx.call), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, layout: str, dim: int) -> torch.Tensor:
        ctx.call = group, layout, dim
        return _join(x, group, layout, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _split(grad, *ctx.call), None, None, None

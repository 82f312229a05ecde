"""Tiles: the rows a GPU program works on, and the device code that several kernels share.

A tile holds BT neighbouring tokens of one chunk times the G query heads of one KV head (padded to GP, a power of two):
row r is token r // GP, head r % GP. All rows of a tile therefore see the same earlier chunks. Tensors are contiguous;
offsets are int64. Names in kernels: T tokens of the tensor, HQ / HK heads, C chunk size (BC its power of two), D head
dim (BD likewise), n chunks of the sequence, grid the [4, slots] table of `ChunkGrid.on`, batch_head = batch x HK + KV
head. `factor` turns q . s into x, `scale2` turns q . k into scores in base 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dash_kernels.device import Device
from dash_kernels.limits import tile_tokens
from dash_kernels.spec import AttentionSpec, Routing

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

LEAST_PRIOR = tl.constexpr(1e-30)  # of a selected chunk whose prior rounds to zero


@dataclass(frozen=True)
class TileShape:
    """Compile-time sizes of the kernels for one call; none depends on the sequence length."""

    query_heads: int
    kv_heads: int
    group: int
    padded_group: int
    tokens: int
    chunk_size: int
    head_dim: int
    padded_dim: int

    @classmethod
    def of(cls, q: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> TileShape:
        query_heads, head_dim = q.shape[2:]
        group = query_heads // kv_heads
        padded_group = triton.next_power_of_2(group)
        tokens = tile_tokens(group, spec.chunk_size)  # at least 16 rows, for tl.dot
        padded_dim = max(triton.next_power_of_2(head_dim), 16)
        return cls(query_heads, kv_heads, group, padded_group, tokens, spec.chunk_size, head_dim, padded_dim)

    @property
    def per_chunk(self) -> int:
        """Tiles of a chunk."""
        return self.chunk_size // self.tokens

    @property
    def constants(self) -> dict[str, int]:
        return {
            "HQ": self.query_heads,
            "HK": self.kv_heads,
            "G": self.group,
            "GP": self.padded_group,
            "BT": self.tokens,
            "C": self.chunk_size,
            "D": self.head_dim,
            "BD": self.padded_dim,
        }


def split_summaries(summaries: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 summaries as (high, low) of a 16-bit dtype with high + low = summary to 16 bits or more.

    q . high + q . low on the tensor cores costs a sixth of a float32 product of that accuracy. Float32 queries need no
    split: both are the summaries themselves, and the kernels leave the second one alone.
    """
    if dtype == torch.float32:
        return summaries, summaries
    high = summaries.to(dtype)
    return high, (summaries - high.float()).to(dtype)


def list_arguments(routing: Routing) -> tuple[torch.Tensor, int]:
    """(lists of chunks, entries of a token's list) for the kernels, which read them where LISTED is set."""
    if routing.lists is None:
        return routing.selected, 0
    return routing.lists, routing.lists.shape[-1]


def routing_factor(spec: AttentionSpec) -> float:
    """Factor of q . s in x = (alpha - 1) z."""
    return spec.routing_logit_scale * (spec.alpha - 1)


def resident_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Number of programs of a persistent kernel that the device holds at a time."""
    return Device.of(device).multiprocessors * per_multiprocessor


@triton.jit
def load_slot(grid_ptr, slots, slot):
    """(id, start, length, first) of the chunk at a slot."""
    chunk = tl.load(grid_ptr + slot)
    start = tl.load(grid_ptr + slots + slot)
    length = tl.load(grid_ptr + 2 * slots + slot)
    first = tl.load(grid_ptr + 3 * slots + slot)
    return chunk, start, length, first


@triton.jit
def tile_rows(
    start, length, step, batch_head, T,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """(place in the chunk [M], index into [B, T, HQ] [M], is not padding [M]) of the rows of a chunk's step-th tile."""
    row = tl.arange(0, BT * GP)
    place = step * BT + row // GP
    head = row % GP
    return place, token_rows(start + place, head, batch_head, T, HQ, HK, G), (place < length) & (head < G)


@triton.jit
def token_rows(token, head, batch_head, T, HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr):
    """Index into [B, T, HQ] of a head of the group at a token, int64."""
    return ((batch_head // HK).to(tl.int64) * T + token) * HQ + (batch_head % HK) * G + head


@triton.jit
def token_offsets(token, batch_head, T, HK: tl.constexpr):
    """Index into [B, T, HK] of tokens, int64."""
    return ((batch_head // HK).to(tl.int64) * T + token) * HK + batch_head % HK


@triton.jit
def load_rows(pointer, row_offset, real, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a [B, T, HQ, D] tensor, zeros where a row or column is padding.  [M, BD]"""
    column = tl.arange(0, BD)
    offsets = row_offset[:, None] * D + column[None, :]
    return tl.load(pointer + offsets, mask=real[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, values, row_offset, real, D: tl.constexpr, BD: tl.constexpr):
    column = tl.arange(0, BD)
    offsets = row_offset[:, None] * D + column[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=real[:, None] & (column < D)[None, :])


@triton.jit
def load_chunk(
    pointer, start, length, batch_head, T, HK: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Tokens of a chunk from [B, T, HK, D], zeros beyond its length.  [BC, BD]"""
    offsets, mask = chunk_offsets(start, length, batch_head, T, HK, BC, D, BD)
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def chunk_offsets(start, length, batch_head, T, HK: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    place = tl.arange(0, BC)
    column = tl.arange(0, BD)
    offsets = token_offsets(start + place, batch_head, T, HK)[:, None] * D + column[None, :]
    return offsets, (place < length)[:, None] & (column < D)[None, :]


@triton.jit
def summary_offset(chunk, batch_head, n, HK: tl.constexpr, D: tl.constexpr):
    """Offset of a chunk's summary in [B, n, HK, D]."""
    batch = (batch_head // HK).to(tl.int64)
    return ((batch * n + chunk) * HK + batch_head % HK) * D


@triton.jit
def routing_scores(
    q, high_ptr, low_ptr, chunk, mask, batch_head, n,
    HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(q . s for chunks [BN], [M, BN], the summaries' high part [BN, BD]).

    Every kernel multiplies with the same high and low parts, so that they agree on what is selected. Not EXACT leaves
    the low part out: a relative error of 2^-9, good enough to come near a threshold.
    """
    column = tl.arange(0, BD)
    offsets = summary_offset(chunk, batch_head, n, HK, D)[:, None] + column[None, :]
    inside = mask[:, None] & (column < D)[None, :]
    high = tl.load(high_ptr + offsets, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(high), input_precision="tf32x3")
    if EXACT and q.dtype != tl.float32:
        low = tl.load(low_ptr + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(low), scores)
    return scores, high


@triton.jit
def listed_hits(
    lists_ptr, width, ids, mask, start, step, length, batch_head, T,
    HK: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """1 where a token of a chunk's step-th tile has the chunk, of ids [BN], in its list, by bisection.  [BT, BN]

    width: entries of a list, ascending.
    """
    place = step * BT + tl.arange(0, BT)
    row = lists_ptr + (token_offsets(start + place, batch_head, T, HK) * width)[:, None]
    wanted = tl.where(mask, ids, -1)[None, :]
    real = (place < length)[:, None]
    below = tl.zeros([BT, BN], tl.int32)  # entries known to be less than the id
    ahead = 1
    while ahead * 2 <= width:
        ahead *= 2
    while ahead > 0:
        at = below + ahead - 1
        entry = tl.load(row + at, mask=real & (at < width), other=2**31 - 1)
        below = tl.where(entry < wanted, below + ahead, below)
        ahead = ahead // 2
    entry = tl.load(row + below, mask=real & (below < width), other=-2)
    return (entry == wanted).to(tl.int32)


@triton.jit
def mean_over_group(rows, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """[M, BN] -> [BT, BN]; padding rows must be zero."""
    return tl.sum(tl.reshape(rows, [BT, GP, BN]), axis=1) / G


@triton.jit
def mean_of_token(rows, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr):
    """Mean over the heads of a token, for each of its rows.  [M] -> [M]"""
    mean = tl.sum(tl.reshape(rows, [BT, GP]), axis=1) / G
    return tl.reshape(tl.broadcast_to(mean[:, None], [BT, GP]), [BT * GP])


@triton.jit
def to_rows(tokens, GP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """[BT, BN] -> [M, BN]"""
    return tl.reshape(tl.broadcast_to(tokens[:, None, :], [BT, GP, BN]), [BT * GP, BN])


@triton.jit
def prior_bias(prior, log2_mean, prior_exponent):
    """Bias of the scores in base 2, -inf where a token did not select the chunk."""
    selected = prior > 0
    return tl.where(selected, (tl.log2(tl.where(selected, prior, 1.0)) - log2_mean) * prior_exponent, -float("inf"))


@triton.jit
def column_of(block, index, BN: tl.constexpr):
    """Column `index` of [M, BN].  [M]"""
    return tl.max(tl.where(tl.arange(0, BN)[None, :] == index, block, -float("inf")), axis=1)

"""Tiles: the rows a GPU program works on, and the pieces of device code that several kernels share.

A tile holds BT neighbouring tokens of one chunk times the G query heads of one KV head (padded to GP, a power of two):
row r is token r // GP, head r % GP. All rows of a tile therefore see the same earlier chunks. Tensors are contiguous;
offsets are int64. Names in kernels: T tokens of the tensor, HQ / HK heads, C chunk size (BC its power of two), D head
dim (BD likewise), n chunks with a summary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dash_kernels.spec import AttentionSpec

TILE_ROWS, TILE_ROWS_WIDE = 64, 32  # wide: head dims above 128, where shared memory is what limits a tile
CHUNK_BLOCK, CHUNK_BLOCK_WIDE = 32, 16  # summaries per step of a routing sweep; tl.dot takes no fewer than 16


@dataclass(frozen=True)
class TileShape:
    """Compile-time sizes of the kernels for one call; none depends on the sequence length."""

    constants: dict[str, object]
    tokens: int
    chunk_block: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, q: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> TileShape:
        query_heads, head_dim = q.shape[2:]
        group = query_heads // kv_heads
        padded_group = triton.next_power_of_2(group)
        padded_dim = max(triton.next_power_of_2(head_dim), 16)
        wide = padded_dim > 128
        rows = TILE_ROWS_WIDE if wide else TILE_ROWS
        # At least 16 rows for tl.dot; a power of two that divides the chunk, so that no tile crosses a chunk's border.
        tokens = max(16 // padded_group, 1)
        while tokens * 2 * padded_group <= rows and spec.chunk_size % (tokens * 2) == 0:
            tokens *= 2
        constants = {
            "HQ": query_heads,
            "HK": kv_heads,
            "G": group,
            "GP": padded_group,
            "BT": tokens,
            "C": spec.chunk_size,
            "BC": triton.next_power_of_2(spec.chunk_size),
            "D": head_dim,
            "BD": padded_dim,
            # float32 inputs are multiplied in full float32; "ieee" is ignored for float16 and bfloat16 operands
            "PRECISION": "ieee",
        }
        return cls(
            constants,
            tokens,
            chunk_block=CHUNK_BLOCK_WIDE if wide else CHUNK_BLOCK,
            num_warps=8 if wide else 4,
            num_stages=1 if wide else 3,
        )

    @property
    def launch(self) -> dict[str, int]:
        """Options of a launch whose programs work on one tile each."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def grid(self, query_chunks: int, batch: int, kv_heads: int, chunk_size: int) -> tuple[int, int]:
        """One program per tile and (batch, KV head); tiles without a token of the tensor do nothing."""
        return query_chunks * (chunk_size // self.tokens), batch * kv_heads


@triton.jit
def tile_rows(
    tile, batch_head, T, HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr
):
    """(token [M], offset of the row in a [B, T, HQ] tensor [M], row is real [M])."""
    row = tl.arange(0, BT * GP)
    token = tile * BT + row // GP
    head = row % GP
    batch = (batch_head // HK).to(tl.int64)
    query_head = (batch_head % HK) * G + head
    return token, (batch * T + token) * HQ + query_head, (token < T) & (head < G)


@triton.jit
def load_rows(pointer, row_offset, real, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a [B, T, HQ, D] tensor, zeros where a row or column is padding.  [M, BD]"""
    column = tl.arange(0, BD)
    offsets = row_offset[:, None] * D + column[None, :]
    return tl.load(pointer + offsets, mask=real[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def chunk_offsets(
    slot, batch_head, T, HK: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """(offsets into [B, T, HK, D] of the tokens of the chunk at a slot [BC, BD], mask of the real ones)."""
    in_chunk = tl.arange(0, BC)
    column = tl.arange(0, BD)
    token = slot * C + in_chunk
    batch = (batch_head // HK).to(tl.int64)
    offsets = ((batch * T + token) * HK + batch_head % HK)[:, None] * D + column[None, :]
    return offsets, ((in_chunk < C) & (token < T))[:, None] & (column < D)[None, :]


@triton.jit
def summary_offset(chunk, batch_head, n, HK: tl.constexpr, D: tl.constexpr):
    """Offset of a chunk's summary in [B, n, HK, D]."""
    batch = (batch_head // HK).to(tl.int64)
    return ((batch * n + chunk) * HK + batch_head % HK) * D


@triton.jit
def mean_over_group(per_row, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr):
    """[M] -> [BT]; padding rows must be zero."""
    return tl.sum(tl.reshape(per_row, [BT, GP]), axis=1) / G


@triton.jit
def to_rows(per_token, GP: tl.constexpr, BT: tl.constexpr):
    """[BT] -> [M]"""
    return tl.reshape(tl.broadcast_to(per_token[:, None], [BT, GP]), [BT * GP])


@triton.jit
def route_one_chunk(q32, summary, tau, factor, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr):
    """(u = sqrt(p) [M], prior P [BT]) of the tile for one chunk; q32 [M, BD] and summary [BD] in float32.

    The forward and both backward kernels call this with the same shapes, so they agree on what is selected bit for bit.
    """
    x = tl.sum(q32 * summary[None, :], axis=1) * factor
    u = tl.maximum(x - tau, 0.0)
    return u, mean_over_group(u * u, G, GP, BT)


@triton.jit
def biased_scores(
    q, k, prior, log_mean, is_own, token, scale, prior_exponent,
    GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the tile against one chunk in base 2, -inf for keys that are not selected or in the future.  [M, BC]"""
    bias = tl.where(prior > 0, (tl.log2(tl.where(prior > 0, prior, 1.0)) - log_mean) * prior_exponent, -float("inf"))
    bias = tl.where(is_own, 0.0, bias)  # [BT]
    in_chunk = tl.arange(0, BC)
    visible = in_chunk[None, :] < tl.where(is_own, token % C + 1, C)[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + to_rows(bias, GP, BT)[:, None]
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def prior_gradient(dscores, u, prior, prior_exponent, prior_floor, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr):
    """u dp [M] of one chunk, from the gradient of the biased scores [M, BC]; dp is that of every head."""
    dbias = mean_over_group(tl.sum(dscores, axis=1), G, GP, BT)
    return u * to_rows(dbias * prior_exponent / tl.maximum(prior, prior_floor), GP, BT)

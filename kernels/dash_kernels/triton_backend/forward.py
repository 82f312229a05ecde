"""Stage 3 in Triton, forward: one program per tile walks the chunks of a part of the sequence and skips those that none
of its tokens selected. Correct and linear in memory; the routing probability of every chunk is recomputed in place.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from dash_kernels.spec import AttentionSpec, ChunkIds, Routing
from dash_kernels.triton_backend.tiles import (
    TileShape,
    biased_scores,
    chunk_offsets,
    load_rows,
    route_one_chunk,
    summary_offset,
    tile_rows,
)

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))


def attend(
    q: torch.Tensor,
    query_chunks: ChunkIds,
    k: torch.Tensor,
    v: torch.Tensor,
    key_chunks: ChunkIds,
    summaries: torch.Tensor,
    routing: Routing,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seq_len = q.shape[:2]
    n, kv_heads = summaries.shape[1:3]
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile = TileShape.of(q, kv_heads, spec)
    attend_fwd_kernel[tile.grid(len(query_chunks), batch, kv_heads, spec.chunk_size)](
        q.contiguous(), query_chunks.on(q.device), k.contiguous(), v.contiguous(), key_chunks.on(q.device), summaries,
        routing.tau, routing.log_mean, out, lse, seq_len, k.shape[1], n, len(key_chunks), *kernel_scales(spec),
        **tile.constants, **tile.launch,
    )  # fmt: skip
    return out, lse


def kernel_scales(spec: AttentionSpec) -> tuple[float, float, float]:
    """(factor of q . s in x, factor of q . k in base-2 scores, factor of log2 P in the bias)."""
    return spec.routing_logit_scale * (spec.alpha - 1), spec.scale * LOG2_E, spec.prior_exponent


@triton.jit(do_not_specialize=["T", "S", "n", "key_chunks"])
def attend_fwd_kernel(
    q_ptr, query_ids_ptr, k_ptr, v_ptr, key_ids_ptr, summary_ptr, tau_ptr, log_mean_ptr, out_ptr, lse_ptr,
    T, S, n, key_chunks, factor, scale, prior_exponent,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, batch_head = tl.program_id(0), tl.program_id(1)
    M: tl.constexpr = BT * GP
    column = tl.arange(0, BD)
    token, row_offset, real = tile_rows(tile, batch_head, T, HQ, HK, G, GP, BT)
    chunk = tl.load(query_ids_ptr + tile * BT // C)
    q = load_rows(q_ptr, row_offset, real, D, BD)
    q32 = q.to(tl.float32)
    tau = tl.load(tau_ptr + row_offset, mask=real, other=0.0)
    log2_mean = load_log2_mean(log_mean_ptr, tile, batch_head, T, HK, BT)

    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, BD], tl.float32)
    for slot in range(0, key_chunks):
        key_chunk = tl.load(key_ids_ptr + slot)
        if key_chunk <= chunk:
            is_own = key_chunk == chunk
            summary_mask = (column < D) & (key_chunk < n)
            summary_at = summary_offset(key_chunk, batch_head, n, HK, D) + column
            summary = tl.load(summary_ptr + summary_at, mask=summary_mask, other=0.0)
            _u, prior = route_one_chunk(q32, summary, tau, factor, G, GP, BT)
            if is_own | (tl.max(prior, axis=0) > 0):
                offsets, mask = chunk_offsets(slot, batch_head, S, HK, C, BC, D, BD)
                k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
                scores = biased_scores(
                    q, k, prior, log2_mean, is_own, token, scale, prior_exponent, GP, BT, C, BC, PRECISION
                )  # fmt: skip
                new_top = tl.maximum(top, tl.max(scores, axis=1))
                finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)  # rows that selected nothing so far
                weights = tl.exp2(scores - finite_top[:, None])
                shrink = tl.exp2(top - finite_top)
                total = total * shrink + tl.sum(weights, axis=1)
                v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
                out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
                top = new_top
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    tl.store(out_ptr + row_offset[:, None] * D + column[None, :], out, mask=real[:, None] & (column < D)[None, :])
    tl.store(lse_ptr + row_offset, lse, mask=real)


@triton.jit
def load_log2_mean(log_mean_ptr, tile, batch_head, T, HK: tl.constexpr, BT: tl.constexpr):
    """Mean of log2 P of the tile's tokens.  [BT]"""
    token = tile * BT + tl.arange(0, BT)
    offset = ((batch_head // HK).to(tl.int64) * T + token) * HK + batch_head % HK
    return tl.load(log_mean_ptr + offset, mask=token < T, other=0.0) / LN_2

"""Stage 3 in Triton, backward: dQ by tiles of queries, dK and dV by chunks of keys; each with its part of the routing
gradient. No atomics: every element of a gradient belongs to one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.spec import PRIOR_FLOOR, AttentionSpec, ChunkIds, GradientSums, Routing
from dash_kernels.triton_backend.forward import LOG2_E, kernel_scales, load_log2_mean
from dash_kernels.triton_backend.tiles import (
    TileShape,
    biased_scores,
    chunk_offsets,
    load_rows,
    prior_gradient,
    route_one_chunk,
    summary_offset,
    tile_rows,
)


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    query_chunks: ChunkIds,
    k: torch.Tensor,
    v: torch.Tensor,
    key_chunks: ChunkIds,
    summaries: torch.Tensor,
    routing: Routing,
    lse: torch.Tensor,
    delta: torch.Tensor,
    spec: AttentionSpec,
    sums: GradientSums,
) -> torch.Tensor:
    batch, seq_len = q.shape[:2]
    n, kv_heads = summaries.shape[1:3]
    tile = TileShape.of(q, kv_heads, spec)
    inputs = (
        grad.contiguous(), q.contiguous(), query_chunks.on(q.device), k.contiguous(), v.contiguous(),
        key_chunks.on(q.device), summaries, routing.tau, routing.log_mean, (lse * LOG2_E).contiguous(),
        delta.contiguous(),
    )  # fmt: skip
    scales = (*kernel_scales(spec), spec.scale, spec.routing_logit_scale, PRIOR_FLOOR)
    dkv = torch.zeros(2, *k.shape, dtype=torch.float32, device=k.device)
    attend_bwd_dq_kernel[tile.grid(len(query_chunks), batch, kv_heads, spec.chunk_size)](
        *inputs, sums.dq, sums.weighted_sum, seq_len, k.shape[1], n, len(key_chunks), *scales,
        **tile.constants, **tile.launch,
    )  # fmt: skip
    attend_bwd_dkdv_kernel[(len(key_chunks), batch * kv_heads)](
        *inputs, dkv[0], dkv[1], sums.dsummaries, seq_len, k.shape[1], n, len(query_chunks), *scales,
        num_warps=8, num_stages=tile.num_stages, **tile.constants,
    )  # fmt: skip
    return dkv


@triton.jit(do_not_specialize=["T", "S", "n", "key_chunks"])
def attend_bwd_dq_kernel(
    grad_ptr, q_ptr, query_ids_ptr, k_ptr, v_ptr, key_ids_ptr, summary_ptr, tau_ptr, log_mean_ptr, lse2_ptr, delta_ptr,
    dq_ptr, weighted_sum_ptr, T, S, n, key_chunks,
    factor, scale2, prior_exponent, scale, logit_scale, prior_floor,
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
    grad = load_rows(grad_ptr, row_offset, real, D, BD)
    tau = tl.load(tau_ptr + row_offset, mask=real, other=0.0)
    lse2 = tl.load(lse2_ptr + row_offset, mask=real, other=float("inf"))  # padding rows weigh nothing
    delta = tl.load(delta_ptr + row_offset, mask=real, other=0.0)
    log2_mean = load_log2_mean(log_mean_ptr, tile, batch_head, T, HK, BT)

    dq_attention = tl.zeros([M, BD], tl.float32)
    dq_routing = tl.zeros([M, BD], tl.float32)
    weighted_sum = tl.zeros([M], tl.float32)
    for slot in range(0, key_chunks):
        key_chunk = tl.load(key_ids_ptr + slot)
        if key_chunk <= chunk:
            is_own = key_chunk == chunk
            summary_mask = (column < D) & (key_chunk < n)
            summary_at = summary_offset(key_chunk, batch_head, n, HK, D) + column
            summary = tl.load(summary_ptr + summary_at, mask=summary_mask, other=0.0)
            u, prior = route_one_chunk(q32, summary, tau, factor, G, GP, BT)
            if is_own | (tl.max(prior, axis=0) > 0):
                offsets, mask = chunk_offsets(slot, batch_head, S, HK, C, BC, D, BD)
                k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
                v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
                scores = biased_scores(
                    q, k, prior, log2_mean, is_own, token, scale2, prior_exponent, GP, BT, C, BC, PRECISION
                )  # fmt: skip
                weights = tl.exp2(scores - lse2[:, None])
                dscores = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                dq_attention += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)
                udp = prior_gradient(dscores, u, prior, prior_exponent, prior_floor, G, GP, BT)
                udp = tl.where(is_own, 0.0, udp)
                weighted_sum += udp
                dq_routing += udp[:, None] * summary[None, :]
    offsets = row_offset[:, None] * D + column[None, :]
    mask = real[:, None] & (column < D)[None, :]
    dq = tl.load(dq_ptr + offsets, mask=mask, other=0.0)
    tl.store(dq_ptr + offsets, dq + dq_attention * scale + dq_routing * logit_scale, mask=mask)
    before = tl.load(weighted_sum_ptr + row_offset, mask=real, other=0.0)
    tl.store(weighted_sum_ptr + row_offset, before + weighted_sum, mask=real)


@triton.jit(do_not_specialize=["T", "S", "n", "query_chunks"])
def attend_bwd_dkdv_kernel(
    grad_ptr, q_ptr, query_ids_ptr, k_ptr, v_ptr, key_ids_ptr, summary_ptr, tau_ptr, log_mean_ptr, lse2_ptr, delta_ptr,
    dk_ptr, dv_ptr, dsummary_ptr, T, S, n, query_chunks,
    factor, scale2, prior_exponent, scale, logit_scale, prior_floor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot, batch_head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BD)
    key_chunk = tl.load(key_ids_ptr + slot)
    summary_at = summary_offset(key_chunk, batch_head, n, HK, D) + column
    summary_mask = (column < D) & (key_chunk < n)
    summary = tl.load(summary_ptr + summary_at, mask=summary_mask, other=0.0)
    offsets, mask = chunk_offsets(slot, batch_head, S, HK, C, BC, D, BD)
    k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0)

    dk = tl.zeros([BC, BD], tl.float32)
    dv = tl.zeros([BC, BD], tl.float32)
    dsummary = tl.zeros([BD], tl.float32)
    for query_chunk in range(0, query_chunks):
        chunk = tl.load(query_ids_ptr + query_chunk)
        if chunk >= key_chunk:
            is_own = key_chunk == chunk
            for step in range(0, C // BT):
                tile = query_chunk * (C // BT) + step
                token, row_offset, real = tile_rows(tile, batch_head, T, HQ, HK, G, GP, BT)
                q = load_rows(q_ptr, row_offset, real, D, BD)
                q32 = q.to(tl.float32)
                tau = tl.load(tau_ptr + row_offset, mask=real, other=0.0)
                u, prior = route_one_chunk(q32, summary, tau, factor, G, GP, BT)
                if is_own | (tl.max(prior, axis=0) > 0):
                    grad = load_rows(grad_ptr, row_offset, real, D, BD)
                    lse2 = tl.load(lse2_ptr + row_offset, mask=real, other=float("inf"))  # padding rows weigh nothing
                    delta = tl.load(delta_ptr + row_offset, mask=real, other=0.0)
                    log2_mean = load_log2_mean(log_mean_ptr, tile, batch_head, T, HK, BT)
                    scores = biased_scores(
                        q, k, prior, log2_mean, is_own, token, scale2, prior_exponent, GP, BT, C, BC, PRECISION
                    )  # fmt: skip
                    weights = tl.exp2(scores - lse2[:, None])
                    dv += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
                    dscores = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                    dk += tl.dot(tl.trans(dscores.to(q.dtype)), q, input_precision=PRECISION)
                    udp = prior_gradient(dscores, u, prior, prior_exponent, prior_floor, G, GP, BT)
                    dsummary += tl.sum(tl.where(is_own, 0.0, udp)[:, None] * q32, axis=0)
    dk = tl.load(dk_ptr + offsets, mask=mask, other=0.0) + dk * scale
    dv = tl.load(dv_ptr + offsets, mask=mask, other=0.0) + dv
    dsummary = tl.load(dsummary_ptr + summary_at, mask=summary_mask, other=0.0) + dsummary * logit_scale
    tl.store(dk_ptr + offsets, dk, mask=mask)
    tl.store(dv_ptr + offsets, dv, mask=mask)
    tl.store(dsummary_ptr + summary_at, dsummary, mask=summary_mask)

"""Device code of one step of the gradients of a chunk's keys, which are accumulated transposed (`key_gradient`)."""

from __future__ import annotations

import triton
import triton.language as tl

from dash_kernels.triton.key_rows import key_offsets
from dash_kernels.triton.tiles import (
    LEAST_PRIOR,
    LN_2,
    LOG2_E,
    load_rows,
    mean_of_token,
    summary_offset,
    tile_rows,
    token_offsets,
)


@triton.jit
def own_gradient(
    grad_ptr, q_ptr, lse_ptr, delta_ptr, k, v, dk, dv, start, length, batch_head, T, scale2,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Adds the queries of the keys' own chunk to (dk, dv), both transposed.  [BD, BC] each"""
    for step in range(0, (length + BT - 1) // BT):
        place, rows, real = tile_rows(start, length, step, batch_head, T, HQ, HK, G, GP, BT)
        q = load_rows(q_ptr, rows, real, D, BD)
        grad = load_rows(grad_ptr, rows, real, D, BD)
        lse2 = tl.load(lse_ptr + rows, mask=real, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + rows, mask=real, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
        visible = tl.arange(0, BC)[None, :] <= place[:, None]
        weights = tl.exp2(tl.where(visible, scores, -float("inf")) - lse2[:, None])
        dweights = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
        dscores = weights * (dweights - delta[:, None])
        dv = tl.dot(tl.trans(grad), weights.to(grad.dtype), dv, input_precision="tf32x3")
        dk = tl.dot(tl.trans(q), dscores.to(q.dtype), dk, input_precision="tf32x3")
    return dk, dv


@triton.jit
def add_rows(
    grad_ptr, q_ptr, tau_ptr, log_mean_ptr, lse_ptr, delta_ptr, ratio_ptr, k, v, summary_weight, dk, dv, along, rows,
    token, real, token_real, batch_head, T, factor, scale2, prior_exponent, scale, logit_scale, prior_floor,
    HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, HAS_SIGMA: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Adds the next queries that selected a chunk to (dk, dv, along).

    along: [HALF, 8, BC] dz (q . k) by key, reduced over the rows of a warp's fragment only.
    """
    HALF: tl.constexpr = BT * GP // 16  # Hopper: a warp's fragment has 16 rows, of which a thread holds 2
    q = load_rows(q_ptr, rows, real, D, BD)
    grad = load_rows(grad_ptr, rows, real, D, BD)
    lse2 = tl.load(lse_ptr + rows, mask=real, other=float("inf")) * LOG2_E  # weigh nothing
    delta = tl.load(delta_ptr + rows, mask=real, other=0.0)
    raw = tl.dot(q, tl.trans(k), input_precision="tf32x3")  # [M, BC]
    if LISTED:
        scores = raw * scale2 - lse2[:, None]
    else:
        tau = tl.load(tau_ptr + rows, mask=real, other=float("inf"))  # padding rows select nothing
        slopes = tl.maximum(tl.sum(raw * summary_weight[None, :], axis=1) * factor - tau, 0.0)
        prior = mean_of_token(slopes * slopes, G, GP, BT)
        bias = tl.log2(tl.maximum(prior, LEAST_PRIOR))
        if HAS_SIGMA:
            group_offset = token_offsets(token, batch_head, T, HK)
            bias -= tl.load(log_mean_ptr + group_offset, mask=token_real, other=0.0) / LN_2
        scores = raw * scale2 + (bias * prior_exponent - lse2)[:, None]
    if BC != C:
        scores = tl.where((tl.arange(0, BC) < C)[None, :], scores, -float("inf"))
    weights = tl.exp2(scores)
    dweights = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
    dscores = weights * (dweights - delta[:, None])
    if not LISTED:
        dbias = mean_of_token(tl.sum(dscores, axis=1), G, GP, BT)  # dB / G
        dp = dbias * prior_exponent / tl.maximum(prior, prior_floor)
        dz = (dp - tl.load(ratio_ptr + rows, mask=real, other=0.0)) * slopes
        along += tl.sum(tl.reshape(raw * dz[:, None], [HALF, 2, 8, BC]), axis=1)
        dscores += summary_weight[None, :] * (dz * (logit_scale / scale))[:, None]
    dv = tl.dot(tl.trans(grad), weights.to(grad.dtype), dv, input_precision="tf32x3")
    dk = tl.dot(tl.trans(q), dscores.to(q.dtype), dk, input_precision="tf32x3")
    return dk, dv, along


@triton.jit
def add_to_chunk(
    k_ptr, query_ptr, dk_ptr, dv_ptr, share_ptr, turn_ptr, piece, summary_weight, dk, dv, along, chunk, start, length,
    batch_head, S, n, scale, logit_scale,
    HK: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds what a piece has summed up to the gradients of its chunk and to its share of summary_query's, in turn."""
    column = tl.arange(0, BD)
    offsets, mask = key_offsets(start, length, batch_head, S, HK, BC, D, BD, BLOCKS)
    k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    query = tl.load(query_ptr + (batch_head % HK) * D + column, mask=column < D, other=0.0).to(tl.float32)
    along_key = tl.sum(tl.sum(along, axis=0), axis=0) * logit_scale
    dlogits = summary_weight * (along_key - tl.sum(summary_weight * along_key, axis=0)) * scale
    dk = tl.trans(dk) * scale + dlogits[:, None] * query[None, :]
    dv = tl.trans(dv)
    wait_for_turn(turn_ptr, piece)
    # Hopper: .cg, because other multiprocessors wrote these and the first-level cache would not know.
    dk += tl.load(dk_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    dv += tl.load(dv_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(dk_ptr + offsets, dk, mask=mask)
    tl.store(dv_ptr + offsets, dv, mask=mask)
    share = share_ptr + summary_offset(chunk, batch_head, n, HK, D)
    dquery = tl.sum(dlogits[:, None] * k, axis=0)
    before = tl.load(share + column, mask=column < D, other=0.0, cache_modifier=".cg")
    tl.store(share + column, before + dquery, mask=column < D)


@triton.jit
def wait_for_turn(turn_ptr, piece):
    """Waits until all earlier pieces have been added to a chunk: the order of additions never varies."""
    # Hopper: spinning is safe, because a program that has started keeps running.
    turn = tl.atomic_add(turn_ptr, 0)
    while turn < piece:
        turn = tl.atomic_add(turn_ptr, 0)

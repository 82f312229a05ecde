"""Stage 2 in Triton, the part of its gradient that needs whole rows, for exchanges that bring K and V in pieces:
`backward_whole` needs none of this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, GradientSums, Routing
from dash_kernels.triton_backend.tiles import (
    TileShape,
    load_rows,
    load_slot,
    routing_factor,
    routing_scores,
    split_summaries,
    summary_offset,
    tile_rows,
)

BLOCK = 32  # summaries per step


def route_backward(
    q: torch.Tensor,
    query_chunks: ChunkGrid,
    summaries: torch.Tensor,
    routing: Routing,
    spec: AttentionSpec,
    sums: GradientSums,
) -> None:
    n, kv_heads = summaries.shape[1:3]
    tile = TileShape.of(q, kv_heads, spec)
    batch_heads = q.shape[0] * kv_heads
    ratio = torch.empty_like(sums.weighted_sum)
    split = split_summaries(summaries, q.dtype)
    q, grid, slots = q.contiguous(), query_chunks.on(q.device), len(query_chunks)
    factors = routing_factor(spec), spec.routing_logit_scale
    route_queries_kernel[(slots * tile.per_chunk, batch_heads)](
        q, grid, *split, routing.tau, sums.weighted_sum, ratio, sums.dq, q.shape[1], n, slots, *factors,
        BN=BLOCK, **tile.constants,
    )  # fmt: skip
    route_summaries_kernel[(triton.cdiv(n, BLOCK), batch_heads)](
        q, grid, *split, routing.tau, ratio, sums.dsummaries, q.shape[1], n, slots, *factors, BN=BLOCK, **tile.constants
    )


@triton.jit(do_not_specialize=["T", "n", "slots"])
def route_queries_kernel(
    q_ptr, grid_ptr, high_ptr, low_ptr, tau_ptr, weighted_sum_ptr, ratio_ptr, dq_ptr, T, n, slots, factor, logit_scale,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ratio = sum(u dp) / sum(u) of every row, and its part of dq."""
    tile, batch_head = tl.program_id(0), tl.program_id(1)
    chunk, start, length, first = load_slot(grid_ptr, slots, tile // (C // BT))
    if tile % (C // BT) * BT < length:
        _place, rows, real = tile_rows(start, length, tile % (C // BT), batch_head, T, HQ, HK, G, GP, BT)
        q = load_rows(q_ptr, rows, real, D, BD)
        tau = tl.load(tau_ptr + rows, mask=real, other=0.0)
        slope_sum = tl.zeros([BT * GP], tl.float32)
        direction = tl.zeros([BT * GP, BD], tl.float32)
        for at in range(first, chunk, BN):
            ids = at + tl.arange(0, BN)
            y, high = routing_scores(q, high_ptr, low_ptr, ids, ids < chunk, batch_head, n, HK, D, BD, True)
            u = tl.where((ids < chunk)[None, :], tl.maximum(y * factor - tau[:, None], 0.0), 0.0)
            slope_sum += tl.sum(u, axis=1)
            direction = tl.dot(u, high.to(tl.float32), direction, input_precision="tf32x3")
        weighted_sum = tl.load(weighted_sum_ptr + rows, mask=real, other=0.0)
        ratio = weighted_sum / tl.where(slope_sum > 0, slope_sum, 1.0)  # 0 / 0 where there is no earlier chunk
        tl.store(ratio_ptr + rows, ratio, mask=real)
        column = tl.arange(0, BD)
        offsets = rows[:, None] * D + column[None, :]
        mask = real[:, None] & (column < D)[None, :]
        dq = tl.load(dq_ptr + offsets, mask=mask, other=0.0)
        tl.store(dq_ptr + offsets, dq - (ratio * logit_scale)[:, None] * direction, mask=mask)


@triton.jit(do_not_specialize=["T", "n", "slots"])
def route_summaries_kernel(
    q_ptr, grid_ptr, high_ptr, low_ptr, tau_ptr, ratio_ptr, dsummary_ptr, T, n, slots, factor, logit_scale,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same part of the summaries' gradient: one program per BN chunks, over all queries of later chunks."""
    block, batch_head = tl.program_id(0), tl.program_id(1)
    ids = block * BN + tl.arange(0, BN)
    grad = tl.zeros([BN, BD], tl.float32)
    for slot in range(0, slots):
        chunk, start, length, first = load_slot(grid_ptr, slots, slot)
        if (chunk > block * BN) & (first < (block + 1) * BN):
            inside = (ids >= first) & (ids < chunk)
            for step in range(0, C // BT):
                _place, rows, real = tile_rows(start, length, step, batch_head, T, HQ, HK, G, GP, BT)
                q = load_rows(q_ptr, rows, real, D, BD)
                tau = tl.load(tau_ptr + rows, mask=real, other=float("inf"))
                ratio = tl.load(ratio_ptr + rows, mask=real, other=0.0)
                y, _high = routing_scores(q, high_ptr, low_ptr, ids, inside, batch_head, n, HK, D, BD, True)
                u = tl.where(inside[None, :], tl.maximum(y * factor - tau[:, None], 0.0), 0.0) * ratio[:, None]
                grad = tl.dot(tl.trans(u), q.to(tl.float32), grad, input_precision="tf32x3")
    column = tl.arange(0, BD)
    offsets = summary_offset(ids, batch_head, n, HK, D)[:, None] + column[None, :]
    mask = (ids < n)[:, None] & (column < D)[None, :]
    dsummary = tl.load(dsummary_ptr + offsets, mask=mask, other=0.0)
    tl.store(dsummary_ptr + offsets, dsummary - grad * logit_scale, mask=mask)

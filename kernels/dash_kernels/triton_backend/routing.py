"""Stage 2 in Triton (alpha = 1.5): exact thresholds by a few sweeps over the summaries, and the part of the gradient
that needs whole rows. No score leaves a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.spec import AttentionSpec, ChunkIds, GradientSums, Routing
from dash_kernels.triton_backend.tiles import TileShape, load_rows, summary_offset, tile_rows

MAX_SWEEPS = tl.constexpr(16)
NEAR_ROOT = tl.constexpr(0.3)  # nearer than this in sum(p), the closed form is accurate enough to be a proof
SUM_TOLERANCE = tl.constexpr(5e-7)


def route(q: torch.Tensor, query_chunks: ChunkIds, summaries: torch.Tensor, spec: AttentionSpec) -> Routing:
    batch, seq_len, query_heads, _ = q.shape
    n, kv_heads = summaries.shape[1:3]
    tau = torch.empty(batch, seq_len, query_heads, dtype=torch.float32, device=q.device)
    log_mean = torch.empty(batch, seq_len, kv_heads, dtype=torch.float32, device=q.device)
    selected = torch.empty(batch, seq_len, kv_heads, dtype=torch.int32, device=q.device)
    tile = TileShape.of(q, kv_heads, spec)
    route_fwd_kernel[tile.grid(len(query_chunks), batch, kv_heads, spec.chunk_size)](
        q.contiguous(), query_chunks.on(q.device), summaries, tau, log_mean, selected, seq_len, n,
        spec.routing_logit_scale * (spec.alpha - 1), HAS_SIGMA=spec.prior_sigma is not None, **_options(tile),
    )  # fmt: skip
    return Routing(tau, log_mean, selected)


def route_backward(
    q: torch.Tensor,
    query_chunks: ChunkIds,
    summaries: torch.Tensor,
    routing: Routing,
    spec: AttentionSpec,
    sums: GradientSums,
) -> None:
    batch, seq_len = q.shape[:2]
    n, kv_heads = summaries.shape[1:3]
    if n == 0:
        return
    tile = TileShape.of(q, kv_heads, spec)
    ids = query_chunks.on(q.device)
    ratio = torch.empty_like(sums.weighted_sum)
    options = _options(tile)
    factor = spec.routing_logit_scale * (spec.alpha - 1)
    q = q.contiguous()
    route_bwd_dq_kernel[tile.grid(len(query_chunks), batch, kv_heads, spec.chunk_size)](
        q, ids, summaries, routing.tau, sums.weighted_sum, ratio, sums.dq, seq_len, n, factor,
        spec.routing_logit_scale, **options,
    )  # fmt: skip
    route_bwd_dsummary_kernel[(triton.cdiv(n, tile.chunk_block), batch * kv_heads)](
        q, ids, summaries, routing.tau, ratio, sums.dsummaries, seq_len, n, len(query_chunks), factor,
        spec.routing_logit_scale, **options,
    )  # fmt: skip


def _options(tile: TileShape) -> dict[str, object]:
    constants = {name: value for name, value in tile.constants.items() if name not in ("BC", "PRECISION")}
    return {"BN": tile.chunk_block, **constants, **tile.launch}


@triton.jit
def _scores(
    q32, summary_ptr, start, end, batch_head, n, factor,
    HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(x of the tile for chunks start .. start + BN, -inf from `end` on [M, BN]; their summaries [BN, BD])."""
    chunk = start + tl.arange(0, BN)
    column = tl.arange(0, BD)
    offsets = summary_offset(chunk, batch_head, n, HK, D)[:, None] + column[None, :]
    summaries = tl.load(summary_ptr + offsets, mask=(chunk < end)[:, None] & (column < D)[None, :], other=0.0)
    # Thresholds are worth nothing at lower precision; three TF32 products give float32's.
    x = tl.dot(q32, tl.trans(summaries), input_precision="tf32x3") * factor
    return tl.where((chunk < end)[None, :], x, -float("inf")), summaries


@triton.jit(do_not_specialize=["T", "n"])
def route_fwd_kernel(
    q_ptr, ids_ptr, summary_ptr, tau_ptr, log_mean_ptr, selected_ptr, T, n, factor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_SIGMA: tl.constexpr,
):  # fmt: skip
    tile, batch_head = tl.program_id(0), tl.program_id(1)
    M: tl.constexpr = BT * GP
    _token, row_offset, real = tile_rows(tile, batch_head, T, HQ, HK, G, GP, BT)
    chunk = tl.load(ids_ptr + tile * BT // C)  # also the number of earlier chunks
    q32 = load_rows(q_ptr, row_offset, real, D, BD).to(tl.float32)

    top = tl.full([M], -float("inf"), tl.float32)
    for start in range(0, chunk, BN):
        x, _summaries = _scores(q32, summary_ptr, start, chunk, batch_head, n, factor, HK, D, BD, BN)
        top = tl.maximum(top, tl.max(x, axis=1))

    # The threshold of x - top lies in [-1, -chunk^(-1/2)]; see dash_kernels.entmax for the iteration.
    low = tl.full([M], -1.0, tl.float32)
    high = tl.full([M], 0.0, tl.float32) - 1.0 / tl.sqrt(tl.maximum(chunk, 1).to(tl.float32))
    t = low
    expected = tl.full([M], -1.0, tl.float32)
    done = tl.full([M], 0, tl.int32)
    open_rows = tl.where(chunk > 0, M, 0)
    sweep = 0
    while (open_rows > 0) & (sweep < MAX_SWEEPS):
        total = tl.zeros([M], tl.float32)
        slope = tl.zeros([M], tl.float32)
        count = tl.zeros([M], tl.float32)
        for start in range(0, chunk, BN):
            x, _summaries = _scores(q32, summary_ptr, start, chunk, batch_head, n, factor, HK, D, BD, BN)
            above = tl.maximum(x - (top + t)[:, None], 0.0)
            total += tl.sum(above * above, axis=1)
            slope += tl.sum(above, axis=1)
            count += tl.sum((above > 0).to(tl.float32), axis=1)
        excess = total - 1.0
        done = tl.where((count == expected) | (tl.abs(excess) <= SUM_TOLERANCE), 1, done)
        low = tl.where((done == 0) & (excess > 0), t, low)
        high = tl.where((done == 0) & (excess < 0), t, high)
        discriminant = slope * slope - count * excess
        closed = excess / (slope + tl.sqrt(tl.maximum(discriminant, 0.0)))
        halley = 2.0 * excess * slope / (4.0 * slope * slope - count * excess)
        proposal = t + tl.where(discriminant >= 0, closed, halley)
        inside = (proposal >= low) & (proposal <= high)  # false for NaN as well
        proof = inside & (discriminant >= 0) & (tl.abs(excess) < NEAR_ROOT)
        expected = tl.where(proof, count, -1.0)
        t = tl.where(done == 1, t, tl.where(inside, proposal, 0.5 * (low + high)))
        open_rows = tl.sum(1 - done, axis=0)
        sweep += 1
    tau = tl.where(chunk > 0, top + t, 0.0)
    tl.store(tau_ptr + row_offset, tau, mask=real)

    routed = tl.zeros([BT], tl.int32)
    log_sum = tl.zeros([BT], tl.float32)
    for start in range(0, chunk, BN):
        x, _summaries = _scores(q32, summary_ptr, start, chunk, batch_head, n, factor, HK, D, BD, BN)
        u = tl.where(real[:, None], tl.maximum(x - tau[:, None], 0.0), 0.0)
        prior = tl.sum(tl.reshape(u * u, [BT, GP, BN]), axis=1) / G  # [BT, BN]
        routed += tl.sum((prior > 0).to(tl.int32), axis=1)
        if HAS_SIGMA:
            log_sum += tl.sum(tl.log(tl.where(prior > 0, prior, 1.0)), axis=1)
    tile_token = tile * BT + tl.arange(0, BT)
    offset = ((batch_head // HK).to(tl.int64) * T + tile_token) * HK + batch_head % HK
    tl.store(selected_ptr + offset, routed + 1, mask=tile_token < T)
    tl.store(log_mean_ptr + offset, log_sum / tl.maximum(routed, 1), mask=tile_token < T)


@triton.jit(do_not_specialize=["T", "n"])
def route_bwd_dq_kernel(
    q_ptr, ids_ptr, summary_ptr, tau_ptr, weighted_sum_ptr, ratio_ptr, dq_ptr, T, n, factor, logit_scale,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ratio = sum(u dp) / sum(u) of every row, and its part of dq."""
    tile, batch_head = tl.program_id(0), tl.program_id(1)
    M: tl.constexpr = BT * GP
    _token, row_offset, real = tile_rows(tile, batch_head, T, HQ, HK, G, GP, BT)
    chunk = tl.load(ids_ptr + tile * BT // C)
    q32 = load_rows(q_ptr, row_offset, real, D, BD).to(tl.float32)
    tau = tl.load(tau_ptr + row_offset, mask=real, other=0.0)
    slope_sum = tl.zeros([M], tl.float32)
    direction = tl.zeros([M, BD], tl.float32)
    for start in range(0, chunk, BN):
        x, summaries = _scores(q32, summary_ptr, start, chunk, batch_head, n, factor, HK, D, BD, BN)
        u = tl.maximum(x - tau[:, None], 0.0)
        slope_sum += tl.sum(u, axis=1)
        direction += tl.dot(u, summaries, input_precision="tf32x3")
    weighted_sum = tl.load(weighted_sum_ptr + row_offset, mask=real, other=0.0)
    ratio = weighted_sum / tl.where(slope_sum > 0, slope_sum, 1.0)  # 0 / 0 where there is no earlier chunk
    tl.store(ratio_ptr + row_offset, ratio, mask=real)
    column = tl.arange(0, BD)
    offsets = row_offset[:, None] * D + column[None, :]
    mask = real[:, None] & (column < D)[None, :]
    dq = tl.load(dq_ptr + offsets, mask=mask, other=0.0)
    tl.store(dq_ptr + offsets, dq - (ratio * logit_scale)[:, None] * direction, mask=mask)


@triton.jit(do_not_specialize=["T", "n", "query_chunks"])
def route_bwd_dsummary_kernel(
    q_ptr, ids_ptr, summary_ptr, tau_ptr, ratio_ptr, dsummary_ptr, T, n, query_chunks, factor, logit_scale,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same part of the summaries' gradient: one program per BN chunks, over all later queries."""
    block, batch_head = tl.program_id(0), tl.program_id(1)
    start = block * BN
    grad = tl.zeros([BN, BD], tl.float32)
    for query_chunk in range(0, query_chunks):
        chunk = tl.load(ids_ptr + query_chunk)
        if chunk > start:
            for step in range(0, C // BT):
                tile = query_chunk * (C // BT) + step
                _token, row_offset, real = tile_rows(tile, batch_head, T, HQ, HK, G, GP, BT)
                q32 = load_rows(q_ptr, row_offset, real, D, BD).to(tl.float32)
                tau = tl.load(tau_ptr + row_offset, mask=real, other=0.0)
                ratio = tl.load(ratio_ptr + row_offset, mask=real, other=0.0)
                end = tl.minimum(chunk, n)
                x, _summaries = _scores(q32, summary_ptr, start, end, batch_head, n, factor, HK, D, BD, BN)
                u = tl.maximum(x - tau[:, None], 0.0) * ratio[:, None]
                grad += tl.dot(tl.trans(u), q32, input_precision="tf32x3")
    chunk = start + tl.arange(0, BN)
    column = tl.arange(0, BD)
    offsets = summary_offset(chunk, batch_head, n, HK, D)[:, None] + column[None, :]
    mask = (chunk < n)[:, None] & (column < D)[None, :]
    dsummary = tl.load(dsummary_ptr + offsets, mask=mask, other=0.0)
    tl.store(dsummary_ptr + offsets, dsummary - grad * logit_scale, mask=mask)

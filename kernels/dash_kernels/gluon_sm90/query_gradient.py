"""Gradient of the queries for Hopper: `triton.query_gradient` on pairs of tiles."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from dash_kernels.gluon_sm90.launch import PairOptions
from dash_kernels.gluon_sm90.priors import load_thresholds, log_priors, routing_slopes
from dash_kernels.gluon_sm90.tile_pairs import (
    NUM_WARPS,
    PARTITION_WARPS,
    PairShape,
    barrier,
    list_of,
    lister,
    load_entries,
    load_lacking,
    loader,
    pair_maps,
    place_of,
    ring_barriers,
    row_offsets,
    selected_word,
    starts_of_head,
    tile_pointers,
    two_lists,
    wait_filled,
    wait_listed,
)
from dash_kernels.spec import PRIOR_FLOOR, AttentionSpec, OutputGradient, Queries, QueryGradient
from dash_kernels.triton.key_rows import KeyRows
from dash_kernels.triton.lists import work_counter
from dash_kernels.triton.tiles import (
    LOG2_E,
    TileShape,
    resident_programs,
    routing_factor,
    split_summaries,
)


def walk_pairs(
    queries: Queries,
    upstream: OutputGradient,
    keys: KeyRows,
    spec: AttentionSpec,
    tile: TileShape,
    options: PairOptions,
    before: QueryGradient,
    result: QueryGradient,
    *,
    first: bool,
    last: bool,
) -> None:
    """Fills `result` as `triton.query_gradient` does."""
    q, chunks, summaries, routing = queries.q, queries.chunks, queries.summaries, queries.routing
    n = summaries.shape[1]
    batch_heads = q.shape[0] * tile.kv_heads
    programs = min(resident_programs(q.device, 1), len(chunks) * tile.per_chunk // 2 * batch_heads)
    dp = torch.empty(programs, 2, n, tile.tokens, dtype=torch.float32, device=q.device)
    shape = PairShape(tile, options.ring, spec.prior_sigma is not None, keys.blocks, options.block, first, last)
    query_gradient_pairs_kernel[(programs,)](
        upstream.grad.contiguous(), q.contiguous(), chunks.on(q.device), *pair_maps(keys, tile), keys.starts,
        *split_summaries(summaries, q.dtype), routing.tau, routing.log_mean, routing.masks, upstream.lse,
        upstream.delta, two_lists(programs, 2 * n, q.device), work_counter(q.device), dp, before.dq,
        before.weighted_sum, before.slope_sum, result.dq, result.weighted_sum, result.slope_sum, q.shape[1],
        keys.tokens, n, len(chunks), batch_heads, routing_factor(spec), spec.scale * LOG2_E.value, spec.prior_exponent,
        spec.scale, spec.routing_logit_scale, PRIOR_FLOOR, SHAPE=shape, TILE_REGISTERS=options.tile_registers,
        HELPER_REGISTERS=options.helper_registers, num_warps=NUM_WARPS, maxnreg=options.max_registers,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["T", "S", "n", "slots", "batch_heads"])
def query_gradient_pairs_kernel(
    grad_ptr, q_ptr, grid_ptr, k_map, v_map, starts_ptr, high_ptr, low_ptr, tau_ptr, log_mean_ptr, mask_ptr, lse_ptr,
    delta_ptr, list_ptr, next_ptr, dp_ptr, before_dq_ptr, before_weighted_ptr, before_slope_ptr, dq_ptr,
    weighted_ptr, slope_ptr, T, S, n, slots, batch_heads, factor, scale2, prior_exponent, scale, logit_scale,
    prior_floor, SHAPE: gl.constexpr, TILE_REGISTERS: gl.constexpr, HELPER_REGISTERS: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = SHAPE.tile.chunk_size
    D: gl.constexpr = SHAPE.tile.head_dim
    BN: gl.constexpr = SHAPE.block
    k_ring = gl.allocate_shared_memory(k_map.dtype, [SHAPE.ring, C, D], k_map.layout)
    v_ring = gl.allocate_shared_memory(v_map.dtype, [SHAPE.ring, C, D], v_map.layout)
    # Of each tile partition: the high and the low part of a block of summaries; the biases of its chunks, and the row
    # sums of the gradients of its scores.
    summaries = gl.allocate_shared_memory(k_map.dtype, [4, BN, D], k_map.layout)
    by_chunk: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    biases = gl.allocate_shared_memory(gl.float32, [2, BN, SHAPE.rows], by_chunk)
    sums = gl.allocate_shared_memory(gl.float32, [2, BN, SHAPE.rows], by_chunk)
    keys = (grid_ptr, starts_ptr, mask_ptr, list_ptr, next_ptr, k_map, v_map)
    routed = (high_ptr, low_ptr, tau_ptr, log_mean_ptr)
    of_rows = (grad_ptr, q_ptr, lse_ptr, delta_ptr, dp_ptr)
    results = (before_dq_ptr, before_weighted_ptr, before_slope_ptr, dq_ptr, weighted_ptr, slope_ptr)
    rows = (routed, of_rows, results)
    buffers = ((k_ring, v_ring), (summaries, biases, sums))
    barriers = ring_barriers(SHAPE.ring)
    sizes = (T, S, n, slots, batch_heads)
    factors = (factor, scale2, prior_exponent, scale, logit_scale, prior_floor)
    gl.warp_specialize(
        [
            (first_tiles, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
            (second_tiles, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
            (lister, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
            (loader, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
        ],
        PARTITION_WARPS,
        [TILE_REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS],
    )


@gluon.jit
def first_tiles(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr):
    walk_tiles(keys, rows, buffers, barriers, sizes, factors, shape, 0)


@gluon.jit
def second_tiles(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr):
    walk_tiles(keys, rows, buffers, barriers, sizes, factors, shape, 1)


@gluon.jit
def walk_tiles(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr, WHICH: gl.constexpr):
    """Partition: the first or the second tile of each pair."""
    C: gl.constexpr = shape.tile.chunk_size
    D: gl.constexpr = shape.tile.head_dim
    G: gl.constexpr = shape.tile.group
    BT: gl.constexpr = shape.tile.tokens
    M: gl.constexpr = shape.rows
    BN: gl.constexpr = shape.block
    of_scores: gl.constexpr = shape.product(C)
    of_dq: gl.constexpr = shape.product(D)
    of_routing: gl.constexpr = shape.product(BN)
    by_score_row: gl.constexpr = gl.SliceLayout(1, of_scores)
    by_routing_row: gl.constexpr = gl.SliceLayout(1, of_routing)
    by_column: gl.constexpr = gl.SliceLayout(0, of_routing)
    grid_ptr, starts_ptr, _mask_ptr, list_ptr, _next_ptr, _k_map, _v_map = keys
    routed, of_rows, results = rows
    grad_ptr, q_ptr, lse_ptr, delta_ptr, dp_ptr = of_rows
    before_dq_ptr, before_weighted_ptr, before_slope_ptr, dq_ptr, weighted_ptr, slope_ptr = results
    chunk_rings, tile_buffers = buffers
    k_ring, v_ring = chunk_rings
    summaries, biases, sums = tile_buffers
    _ready, free, listed, done = barriers
    T, _S, n, slots, _batch_heads = sizes
    factor, scale2, prior_exponent, scale, logit_scale, prior_floor = factors
    by_row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bias_rows = biases._reinterpret(gl.float32, [2 * BN, M], by_row)
    sum_rows = sums._reinterpret(gl.float32, [2 * BN, M], by_row)
    own_dp = dp_ptr + (gl.program_id(0) * 2 + WHICH).to(gl.int64) * n * BT
    turn = 0
    met = 0
    work = wait_listed(list_ptr, listed, turn, 2 * n)
    while work >= 0:
        batch_head, tile, slot = place_of(work, slots, shape)
        step = (tile + WHICH) % shape.tile.per_chunk
        start = gl.load(grid_ptr + slots + slot)
        q = gl.load(tile_pointers(q_ptr, start, step, batch_head, T, shape.factor(C), shape))
        grad = gl.load(tile_pointers(grad_ptr, start, step, batch_head, T, shape.factor(C), shape))
        place, row_at = row_offsets(start, step, batch_head, T, by_score_row, shape)
        lse2 = gl.load(lse_ptr + row_at) * LOG2_E
        delta = gl.load(delta_ptr + row_at)
        tau, log2_mean = load_thresholds(routed, start, step, batch_head, T, shape)
        dq = gl.zeros([M, D], gl.float32, of_dq)
        weighted_sum = gl.zeros([M], gl.float32, by_routing_row)
        slope_sum = gl.zeros([M], gl.float32, by_routing_row)
        if gl.load(starts_of_head(starts_ptr, batch_head, n, shape) + gl.load(grid_ptr + slot)) >= 0:
            at = wait_filled(barriers, met, shape)
            scores, dweights = two_products(q, grad, k_ring.index(at), v_ring.index(at), shape)
            key = gl.arange(0, C, gl.SliceLayout(0, of_scores))
            scores = gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(place, 1), scores * scale2, -float("inf"))
            _dscores, dq = add_score_gradient(scores, dweights, lse2, delta, k_ring.index(at), dq, shape)
            mbarrier.arrive(free.index(at), count=1)
            met += 1
        list_at = list_of(list_ptr, turn, 2 * n)
        count = gl.load(list_at)
        for block in range(0, count, BN):
            entries = load_entries(list_at, block, count, shape)
            slopes, _high = routing_slopes(
                q, entries, count - block, tau, routed, summaries, batch_head, n, factor, shape, WHICH
            )
            prior, log_prior = log_priors(slopes, shape)
            bias = (log_prior - gl.expand_dims(log2_mean, 1)) * prior_exponent
            biases.index(WHICH).store(gl.permute(bias, (1, 0)))
            word = selected_word(entries, shape, WHICH)
            barrier()  # the biases are there
            for index in range(0, gl.minimum(count - block, BN)):
                at = wait_filled(barriers, met, shape)
                if ((word >> index) & 1) != 0:
                    bias_at = bias_rows.index(WHICH * BN + index).load(by_score_row)
                    scores, dweights = two_products(q, grad, k_ring.index(at), v_ring.index(at), shape)
                    scores = scores * scale2 + gl.expand_dims(bias_at, 1)
                    dscores, dq = add_score_gradient(scores, dweights, lse2, delta, k_ring.index(at), dq, shape)
                    sum_rows.index(WHICH * BN + index).store(dscores)
                mbarrier.arrive(free.index(at), count=1)
                met += 1
            barrier()  # the row sums are there
            column = gl.arange(0, BN, by_column)
            met_here = gl.expand_dims(((word >> column) & 1) != 0, 0)
            of_heads = gl.where(met_here, sums.index(WHICH).permute((1, 0)).load(of_routing), 0.0)
            of_heads = gl.reshape(of_heads, [BT, G, BN])
            mean = gl.expand_dims(gl.sum(of_heads, 1) / G, 1) + gl.zeros_like(of_heads)
            mean = gl.convert_layout(gl.reshape(mean, [M, BN]), of_routing)
            dp = mean * prior_exponent / gl.maximum(prior, prior_floor)
            weighted_sum += gl.sum(slopes * dp, 1)
            slope_sum += gl.sum(slopes, 1)
            pointers, of_first_head = dp_pointers(own_dp, block, shape)
            inside = gl.expand_dims(block + column < count, 0)
            gl.store(pointers, dp, mask=inside & of_first_head)
        barrier()  # other threads read what this one wrote

        # The routing's share, dz . s with dz = u (dp - ratio): ratio is known only when all parts have been met.
        dq *= scale
        _place, routing_row_at = row_offsets(start, step, batch_head, T, by_routing_row, shape)
        if not shape.is_first_part:
            weighted_sum += gl.load(before_weighted_ptr + routing_row_at)
            slope_sum += gl.load(before_slope_ptr + routing_row_at)
        ratio = gl.zeros([M], gl.float32, by_routing_row)
        if shape.is_last_part:
            ratio = weighted_sum / gl.where(slope_sum > 0, slope_sum, 1.0)
        for block in range(0, count, BN):
            entries = load_entries(list_at, block, count, shape)
            slopes, high = routing_slopes(
                q, entries, count - block, tau, routed, summaries, batch_head, n, factor, shape, WHICH
            )
            pointers, _of_first_head = dp_pointers(own_dp, block, shape)
            inside = gl.expand_dims(block + gl.arange(0, BN, by_column) < count, 0)
            centred = gl.load(pointers, mask=inside, other=0.0) - gl.expand_dims(ratio, 1)
            dq = add_routing_gradient(dq, slopes * centred * logit_scale, high, shape)
        if shape.is_last_part and not shape.is_first_part:
            # The chunks of the parts before have had their share of dp, and wait for that of the ratio.
            lacking = gl.load(list_at + 2)
            for block in range(0, lacking, BN):
                entries = load_lacking(list_at, block, lacking, n, shape)
                slopes, high = routing_slopes(
                    q, entries, lacking - block, tau, routed, summaries, batch_head, n, factor, shape, WHICH
                )
                dq = add_routing_gradient(dq, -slopes * gl.expand_dims(ratio, 1) * logit_scale, high, shape)
        mbarrier.arrive(done.index(turn & 1), count=1)
        turn += 1
        if not shape.is_first_part:
            dq += gl.load(tile_pointers(before_dq_ptr, start, step, batch_head, T, of_dq, shape))
        if shape.is_last_part:
            gl.store(weighted_ptr + routing_row_at, ratio)
        else:
            gl.store(weighted_ptr + routing_row_at, weighted_sum)
            gl.store(slope_ptr + routing_row_at, slope_sum)
        pointers = tile_pointers(dq_ptr, start, step, batch_head, T, of_dq, shape)
        gl.store(pointers, dq.to(dq_ptr.dtype.element_ty))
        work = wait_listed(list_ptr, listed, turn, 2 * n)


@gluon.jit
def two_products(q, grad, k, v, shape: gl.constexpr):
    """q . k and grad . v, [M, C] each."""
    C: gl.constexpr = shape.tile.chunk_size
    M: gl.constexpr = shape.rows
    layout: gl.constexpr = shape.product(C)
    zeros = gl.zeros([M, C], gl.float32, layout)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dweights = warpgroup_mma(grad, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores, dweights = warpgroup_mma_wait(0, deps=[scores, dweights])
    return scores, dweights


@gluon.jit
def add_score_gradient(scores, dweights, lse2, delta, k, dq, shape: gl.constexpr):
    """(row sums [M] of the gradient of the scores, dq plus its product with k)."""
    weights = gl.exp2(scores - gl.expand_dims(lse2, 1))
    dscores = weights * (dweights - gl.expand_dims(delta, 1))
    rounded = gl.convert_layout(dscores.to(k.dtype), shape.factor(shape.tile.head_dim))
    dq = warpgroup_mma_wait(0, deps=[warpgroup_mma(rounded, k, dq, is_async=True)])
    return gl.sum(dscores, 1), dq


@gluon.jit
def add_routing_gradient(dq, dz, high, shape: gl.constexpr):
    """dq plus the gradient dz [M, BN] of the routing logits through the summaries."""
    rounded = gl.convert_layout(dz.to(high.dtype), shape.factor(shape.tile.head_dim))
    dq = warpgroup_mma_wait(0, deps=[warpgroup_mma(rounded, high, dq, is_async=True)])
    barrier()  # the summaries are written anew
    return dq


@gluon.jit
def dp_pointers(own_dp, block, shape: gl.constexpr):
    """(pointers to the gradients of the priors of a block of a list, whether a row is a token's first head)."""
    layout: gl.constexpr = shape.product(shape.block)
    M: gl.constexpr = shape.rows
    row = gl.expand_dims(gl.arange(0, M, gl.SliceLayout(1, layout)), 1)
    listed = gl.expand_dims(block + gl.arange(0, shape.block, gl.SliceLayout(0, layout)), 0)
    return own_dp + listed * shape.tile.tokens + row // shape.tile.group, row % shape.tile.group == 0

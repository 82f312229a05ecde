"""Stage 3 for Hopper, forward: `forward` on pairs of tiles; the same numbers to the last bit."""

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
from dash_kernels.spec import AttentionSpec, Queries
from dash_kernels.triton.key_rows import KeyRows
from dash_kernels.triton.lists import work_counter
from dash_kernels.triton.tiles import (
    LN_2,
    LOG2_E,
    TileShape,
    resident_programs,
    routing_factor,
    split_summaries,
)

NOTHING = gl.constexpr(-1.0e30)  # see `forward.NOTHING`


def attend_pairs(
    queries: Queries,
    keys: KeyRows,
    spec: AttentionSpec,
    tile: TileShape,
    options: PairOptions,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes `out` and `lse` as `forward.attend` does."""
    q, chunks, summaries, routing = queries.q, queries.chunks, queries.summaries, queries.routing
    n = summaries.shape[1]
    batch_heads = q.shape[0] * tile.kv_heads
    programs = min(resident_programs(q.device, 1), len(chunks) * tile.per_chunk // 2 * batch_heads)
    before_out, before_lse = (out, lse) if before is None else before
    has_sigma, is_first_part = spec.prior_sigma is not None, before is None
    shape = PairShape(tile, options.ring, has_sigma, keys.blocks, options.block, is_first_part, is_last_part=False)
    attend_pairs_kernel[(programs,)](
        q.contiguous(), chunks.on(q.device), *pair_maps(keys, tile), keys.starts, *split_summaries(summaries, q.dtype),
        routing.tau, routing.log_mean, routing.masks, two_lists(programs, 2 * n, q.device), work_counter(q.device),
        before_out, before_lse, out, lse, q.shape[1], keys.tokens, n, len(chunks), batch_heads, routing_factor(spec),
        spec.scale * LOG2_E.value, spec.prior_exponent, SHAPE=shape, TILE_REGISTERS=options.tile_registers,
        HELPER_REGISTERS=options.helper_registers, num_warps=NUM_WARPS, maxnreg=options.max_registers,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["T", "S", "n", "slots", "batch_heads"])
def attend_pairs_kernel(
    q_ptr, grid_ptr, k_map, v_map, starts_ptr, high_ptr, low_ptr, tau_ptr, log_mean_ptr, mask_ptr, list_ptr, next_ptr,
    before_out_ptr, before_lse_ptr, out_ptr, lse_ptr, T, S, n, slots, batch_heads, factor, scale2, prior_exponent,
    SHAPE: gl.constexpr, TILE_REGISTERS: gl.constexpr, HELPER_REGISTERS: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = SHAPE.tile.chunk_size
    D: gl.constexpr = SHAPE.tile.head_dim
    k_ring = gl.allocate_shared_memory(k_map.dtype, [SHAPE.ring, C, D], k_map.layout)
    v_ring = gl.allocate_shared_memory(v_map.dtype, [SHAPE.ring, C, D], v_map.layout)
    # Of each tile partition: the high and the low part of a block of summaries, and the biases of its chunks.
    summaries = gl.allocate_shared_memory(k_map.dtype, [4, SHAPE.block, D], k_map.layout)
    by_chunk: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    biases = gl.allocate_shared_memory(gl.float32, [2, SHAPE.block, SHAPE.rows], by_chunk)
    keys = (grid_ptr, starts_ptr, mask_ptr, list_ptr, next_ptr, k_map, v_map)
    routed = (high_ptr, low_ptr, tau_ptr, log_mean_ptr)
    rows = (q_ptr, routed, before_out_ptr, before_lse_ptr, out_ptr, lse_ptr)
    buffers = ((k_ring, v_ring), (summaries, biases))
    barriers = ring_barriers(SHAPE.ring)
    sizes = (T, S, n, slots, batch_heads)
    factors = (factor, scale2, prior_exponent)
    gl.warp_specialize(
        [
            (attend_first, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
            (attend_second, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
            (lister, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
            (loader, (keys, rows, buffers, barriers, sizes, factors, SHAPE)),
        ],
        PARTITION_WARPS,
        [TILE_REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS],
    )


@gluon.jit
def attend_first(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr):
    attend_tiles(keys, rows, buffers, barriers, sizes, factors, shape, 0)


@gluon.jit
def attend_second(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr):
    attend_tiles(keys, rows, buffers, barriers, sizes, factors, shape, 1)


@gluon.jit
def attend_tiles(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr, WHICH: gl.constexpr):
    """Partition: the first or the second tile of each pair."""
    C: gl.constexpr = shape.tile.chunk_size
    D: gl.constexpr = shape.tile.head_dim
    M: gl.constexpr = shape.rows
    BN: gl.constexpr = shape.block
    of_scores: gl.constexpr = shape.product(C)
    of_out: gl.constexpr = shape.product(D)
    by_score_row: gl.constexpr = gl.SliceLayout(1, of_scores)
    by_out_row: gl.constexpr = gl.SliceLayout(1, of_out)
    grid_ptr, starts_ptr, _mask_ptr, list_ptr, _next_ptr, _k_map, _v_map = keys
    q_ptr, routed, before_out_ptr, before_lse_ptr, out_ptr, lse_ptr = rows
    chunk_rings, tile_buffers = buffers
    k_ring, v_ring = chunk_rings
    summaries, biases = tile_buffers
    _ready, free, listed, done = barriers
    T, _S, n, slots, _batch_heads = sizes
    factor, scale2, prior_exponent = factors
    bias_rows = biases._reinterpret(gl.float32, [2 * BN, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    turn = 0
    met = 0
    work = wait_listed(list_ptr, listed, turn, 2 * n)
    while work >= 0:
        batch_head, tile, slot = place_of(work, slots, shape)
        step = (tile + WHICH) % shape.tile.per_chunk
        start = gl.load(grid_ptr + slots + slot)
        q = gl.load(tile_pointers(q_ptr, start, step, batch_head, T, shape.factor(C), shape))
        tau, log2_mean = load_thresholds(routed, start, step, batch_head, T, shape)
        place, row_at = row_offsets(start, step, batch_head, T, by_score_row, shape)
        if shape.is_first_part:
            top = gl.full([M], NOTHING, gl.float32, by_score_row)
            total = gl.zeros([M], gl.float32, by_score_row)
            out = gl.zeros([M, D], gl.float32, of_out)
        else:
            # The log-sum-exp as the maximum makes the output so far one of weight 1.
            before = gl.load(before_lse_ptr + row_at)
            met_before = before > -float("inf")
            top = gl.where(met_before, before * LOG2_E, NOTHING)
            total = met_before.to(gl.float32)
            out = gl.load(tile_pointers(before_out_ptr, start, step, batch_head, T, of_out, shape))
        if gl.load(starts_of_head(starts_ptr, batch_head, n, shape) + gl.load(grid_ptr + slot)) >= 0:
            at = wait_filled(barriers, met, shape)
            scores = product(q, k_ring.index(at).permute((1, 0)), M, C, of_scores) * scale2
            key = gl.arange(0, C, gl.SliceLayout(0, of_scores))
            scores = gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(place, 1), scores, -float("inf"))
            top, total, out = softmax_step(scores, v_ring.index(at), top, total, out, shape)
            mbarrier.arrive(free.index(at), count=1)
            met += 1
        list_at = list_of(list_ptr, turn, 2 * n)
        count = gl.load(list_at)
        for block in range(0, count, BN):
            entries = load_entries(list_at, block, count, shape)
            slopes, _high = routing_slopes(
                q, entries, count - block, tau, routed, summaries, batch_head, n, factor, shape, WHICH
            )
            _prior, log_prior = log_priors(slopes, shape)
            bias = (log_prior - gl.expand_dims(log2_mean, 1)) * prior_exponent
            biases.index(WHICH).store(gl.permute(bias, (1, 0)))
            word = selected_word(entries, shape, WHICH)
            barrier()  # the biases are there
            for index in range(0, gl.minimum(count - block, BN)):
                at = wait_filled(barriers, met, shape)
                if ((word >> index) & 1) != 0:
                    bias_at = bias_rows.index(WHICH * BN + index).load(by_score_row)
                    scores = product(q, k_ring.index(at).permute((1, 0)), M, C, of_scores) * scale2
                    scores += gl.expand_dims(bias_at, 1)
                    top, total, out = softmax_step(scores, v_ring.index(at), top, total, out, shape)
                mbarrier.arrive(free.index(at), count=1)
                met += 1
        mbarrier.arrive(done.index(turn & 1), count=1)
        turn += 1
        any_met = total > 0
        weight = gl.where(any_met, total, 1.0)
        out = out / gl.expand_dims(gl.convert_layout(weight, by_out_row), 1)
        gl.store(tile_pointers(out_ptr, start, step, batch_head, T, of_out, shape), out.to(out_ptr.dtype.element_ty))
        lse = gl.where(any_met, (top + gl.log2(weight)) * LN_2, -float("inf"))
        gl.store(lse_ptr + row_at, lse)
        work = wait_listed(list_ptr, listed, turn, 2 * n)


@gluon.jit
def product(a, b, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """a, in registers, times b, in shared memory.  [ROWS, COLUMNS]"""
    sums = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    return warpgroup_mma_wait(0, deps=[warpgroup_mma(a, b, sums, use_acc=False, is_async=True)])


@gluon.jit
def softmax_step(scores, v, top, total, out, shape: gl.constexpr):
    """`steps.softmax_step`, v in shared memory."""
    by_out: gl.constexpr = shape.product(shape.tile.head_dim)
    new_top = gl.maximum(top, gl.max(scores, 1))
    weights = gl.exp2(scores - gl.expand_dims(new_top, 1))
    shrink = gl.exp2(top - new_top)
    total = total * shrink + gl.sum(weights, 1)
    out = out * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, by_out)), 1)
    weights = gl.convert_layout(weights.to(v.dtype), shape.factor(shape.tile.head_dim))
    return new_top, total, warpgroup_mma_wait(0, deps=[warpgroup_mma(weights, v, out, is_async=True)])

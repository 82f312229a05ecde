"""Gradient of the queries: a tile walks its list as in the forward pass, then its summaries for the routing's share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.gluon_sm90.launch import pair_options
from dash_kernels.spec import PRIOR_FLOOR, AttentionSpec, Blocks, OutputGradient, Part, Queries, QueryGradient
from dash_kernels.triton.attend import listed_bias, load_log2_mean, routing_block
from dash_kernels.triton.key_rows import KeyRows, load_keys, load_own_keys, starts_of
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.lists import chunk_lists, list_chunks, work_counter
from dash_kernels.triton.steps import add_routing_gradient, score_gradient
from dash_kernels.triton.tiles import (
    LOG2_E,
    TileShape,
    column_of,
    list_arguments,
    load_rows,
    load_slot,
    mean_over_group,
    resident_programs,
    routing_factor,
    split_summaries,
    store_rows,
    tile_rows,
    to_rows,
)


def query_gradient(
    queries: Queries, upstream: OutputGradient, part: Part | Blocks, spec: AttentionSpec, before: QueryGradient | None
) -> QueryGradient:
    if before is None:
        sums = torch.empty(2, *queries.q.shape[:3], dtype=torch.float32, device=queries.q.device)
        result = QueryGradient(torch.empty(queries.q.shape, dtype=torch.float32, device=queries.q.device), *sums)
    else:
        result = before
    _walk(queries, upstream, part, spec, before or result, result, first=before is None, last=False)
    return result


def finish_query_gradient(
    queries: Queries, upstream: OutputGradient, part: Part | Blocks, spec: AttentionSpec, before: QueryGradient | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dq = torch.empty(queries.q.shape, dtype=queries.q.dtype, device=queries.q.device)
    ratio = torch.empty(queries.q.shape[:3], dtype=torch.float32, device=queries.q.device)
    result = QueryGradient(dq, ratio, ratio)
    _walk(queries, upstream, part, spec, before or result, result, first=before is None, last=True)
    return dq, ratio


def _walk(
    queries: Queries,
    upstream: OutputGradient,
    part: Part | Blocks,
    spec: AttentionSpec,
    before: QueryGradient,
    result: QueryGradient,
    *,
    first: bool,
    last: bool,
) -> None:
    """first: `before` is not read. last: the result is complete, and its weighted_sum takes the ratio."""
    q, chunks, summaries, routing = queries.q, queries.chunks, queries.summaries, queries.routing
    n, kv_heads = summaries.shape[1:3]
    tile = TileShape.of(q, kv_heads, spec)
    keys = KeyRows.of(part, summaries.shape, tile)
    in_pairs = pair_options("query_gradient", q, tile, chunks)
    if in_pairs is not None and keys.aligned and routing.lists is None:
        from dash_kernels.gluon_sm90.query_gradient import walk_pairs  # Gluon is not in every Triton

        walk_pairs(queries, upstream, keys, spec, tile, in_pairs, before, result, first=first, last=last)
        return
    options = launch_options("query_gradient", q)
    k_map, v_map, maps = keys.maps(tile, options)
    tiles = len(chunks) * tile.per_chunk
    programs = min(resident_programs(q.device, options.resident), tiles * q.shape[0] * kv_heads)
    dp = torch.empty(programs, n, tile.tokens, dtype=torch.float32, device=q.device)
    query_gradient_kernel[(programs,)](
        upstream.grad.contiguous(), q.contiguous(), chunks.on(q.device), keys.k, keys.v, k_map, v_map, keys.starts,
        *split_summaries(summaries, q.dtype), routing.tau, routing.log_mean, routing.masks, upstream.lse,
        upstream.delta, chunk_lists(programs, n, q.device), work_counter(q.device), dp,
        before.dq, before.weighted_sum, before.slope_sum, result.dq, result.weighted_sum, result.slope_sum,
        *list_arguments(routing), q.shape[1], keys.tokens, n, len(chunks), q.shape[0] * kv_heads, routing_factor(spec),
        spec.scale * LOG2_E.value, spec.prior_exponent, spec.scale, spec.routing_logit_scale, PRIOR_FLOOR, 1.0,
        BC=triton.next_power_of_2(spec.chunk_size), BN=options.block, HAS_SIGMA=spec.prior_sigma is not None,
        MAPS=maps, BLOCKS=keys.blocks, IS_FIRST_PART=first, IS_LAST_PART=last, LISTED=routing.lists is not None,
        **tile.constants, **options.launch,
    )  # fmt: skip


@triton.jit(do_not_specialize=["width", "T", "S", "n", "slots", "batch_heads"])
def query_gradient_kernel(
    grad_ptr, q_ptr, grid_ptr, k_ptr, v_ptr, k_map, v_map, starts_ptr, high_ptr, low_ptr, tau_ptr, log_mean_ptr,
    mask_ptr, lse_ptr, delta_ptr, list_ptr, next_ptr, dp_ptr, before_dq_ptr, before_weighted_ptr,
    before_slope_ptr, dq_ptr, weighted_ptr, slope_ptr, lists_ptr, width,
    T, S, n, slots, batch_heads, factor, scale2, prior_exponent, scale, logit_scale, prior_floor, one,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_SIGMA: tl.constexpr,
    MAPS: tl.constexpr, BLOCKS: tl.constexpr, IS_FIRST_PART: tl.constexpr, IS_LAST_PART: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = BT * GP
    STEPS: tl.constexpr = C // BT
    tiles = slots * STEPS
    words = (n + 31) // 32
    ids_ptr = list_ptr + tl.program_id(0).to(tl.int64) * 2 * n
    list_starts_ptr = ids_ptr + n
    my_dp_ptr = dp_ptr + tl.program_id(0).to(tl.int64) * n * BT
    work = tl.atomic_add(next_ptr, 1)  # handed out one by one: lists differ in length
    while work < tiles * batch_heads:
        batch_head = work // tiles
        tile = tiles - 1 - work % tiles
        chunk, start, length, first = load_slot(grid_ptr, slots, tile // STEPS)
        if tile % STEPS * BT < length:
            place, rows, real = tile_rows(start, length, tile % STEPS, batch_head, T, HQ, HK, G, GP, BT)
            q = load_rows(q_ptr, rows, real, D, BD)
            grad = load_rows(grad_ptr, rows, real, D, BD)
            if not LISTED:
                tau = tl.load(tau_ptr + rows, mask=real, other=float("inf"))  # padding rows select nothing
                log2_mean = load_log2_mean(log_mean_ptr, start, tile % STEPS, length, batch_head, T, HK, BT, HAS_SIGMA)
            lse2 = tl.load(lse_ptr + rows, mask=real, other=float("inf")) * LOG2_E  # and weigh nothing
            delta = tl.load(delta_ptr + rows, mask=real, other=0.0)
            mask_row = mask_ptr + (batch_head.to(tl.int64) * tiles + tile) * words
            starts = starts_of(starts_ptr, batch_head, n, BLOCKS)
            count = list_chunks(mask_row, words, starts, ids_ptr, list_starts_ptr, first, chunk, True, 1)

            dq = tl.zeros([M, BD], tl.float32)
            weighted_sum = tl.zeros([M], tl.float32)
            slope_sum = tl.zeros([M], tl.float32)
            own = tl.load(starts + chunk)
            if own >= 0:
                k, v = load_own_keys(k_ptr, v_ptr, own, length, batch_head, S, HK, BC, D, BD, BLOCKS)
                scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
                scores = tl.where(tl.arange(0, BC)[None, :] <= place[:, None], scores, -float("inf"))
                dscores = score_gradient(scores, grad, v, lse2, delta)
                dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="tf32x3")
            for block in range(0, count, BN):
                listed = block + tl.arange(0, BN)
                ids = tl.load(ids_ptr + listed, mask=listed < count, other=0)
                if LISTED:
                    bias = listed_bias(
                        lists_ptr, width, ids, listed < count, start, tile % STEPS, length, batch_head, T,
                        HK, GP, BT, BN,
                    )  # fmt: skip
                else:
                    slopes, prior, bias = routing_block(
                        q, high_ptr, low_ptr, ids, listed < count, batch_head, n, tau, log2_mean, factor,
                        prior_exponent, HK, G, GP, BT, D, BD, BN,
                    )  # fmt: skip
                sums = tl.zeros([M, BN], tl.float32)
                for index in range(0, tl.minimum(count - block, BN)):
                    at = tl.load(list_starts_ptr + block + index)
                    k, v = load_keys(k_ptr, v_ptr, k_map, v_map, at, batch_head, S, HK, C, BC, D, BD, MAPS, BLOCKS)
                    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
                    scores += column_of(bias, index, BN)[:, None]
                    if BC != C:
                        scores = tl.where((tl.arange(0, BC) < C)[None, :], scores, -float("inf"))
                    dscores = score_gradient(scores, grad, v, lse2, delta)
                    dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="tf32x3")
                    dq *= one  # ends the product here: in flight, it makes ptxas serialise the next ones
                    if not LISTED:
                        sums = tl.where(tl.arange(0, BN)[None, :] == index, tl.sum(dscores, axis=1)[:, None], sums)
                if not LISTED:
                    dp = mean_over_group(sums, G, GP, BT, BN) * prior_exponent / tl.maximum(prior, prior_floor)
                    weighted_sum += tl.sum(slopes * to_rows(dp, GP, BT, BN), axis=1)
                    slope_sum += tl.sum(slopes, axis=1)
                    at_dp = listed[None, :] * BT + tl.arange(0, BT)[:, None]
                    tl.store(my_dp_ptr + at_dp, dp, mask=(listed < count)[None, :])
            tl.debug_barrier()  # other threads read what this one wrote

            # The routing's share, dz . s with dz = u (dp - ratio): ratio is known only when all parts have been met.
            dq *= scale
            if not IS_FIRST_PART:
                weighted_sum += tl.load(before_weighted_ptr + rows, mask=real, other=0.0)
                slope_sum += tl.load(before_slope_ptr + rows, mask=real, other=0.0)
            ratio = tl.zeros([M], tl.float32)
            if IS_LAST_PART:
                ratio = weighted_sum / tl.where(slope_sum > 0, slope_sum, 1.0)
            if not LISTED:  # else no gradient passes through the selection
                for block in range(0, count, BN):
                    listed = block + tl.arange(0, BN)
                    inside = listed < count
                    ids = tl.load(ids_ptr + listed, mask=inside, other=0)
                    at_dp = listed[None, :] * BT + tl.arange(0, BT)[:, None]
                    dp = tl.load(my_dp_ptr + at_dp, mask=inside[None, :], other=0.0)
                    centred = to_rows(dp, GP, BT, BN) - ratio[:, None]
                    dq = add_routing_gradient(
                        dq, centred, q, high_ptr, low_ptr, ids, inside, batch_head, n, tau, factor, logit_scale,
                        HK, D, BD,
                    )  # fmt: skip
            tl.debug_barrier()  # the list is written anew
            if IS_LAST_PART and not IS_FIRST_PART and not LISTED:
                # The chunks of the parts before have had their share of dp, and wait for that of the ratio.
                count = list_chunks(mask_row, words, starts, ids_ptr, list_starts_ptr, first, chunk, False, 1)
                for block in range(0, count, BN):
                    listed = block + tl.arange(0, BN)
                    inside = listed < count
                    ids = tl.load(ids_ptr + listed, mask=inside, other=0)
                    centred = tl.zeros([M, BN], tl.float32) - ratio[:, None]
                    dq = add_routing_gradient(
                        dq, centred, q, high_ptr, low_ptr, ids, inside, batch_head, n, tau, factor, logit_scale,
                        HK, D, BD,
                    )  # fmt: skip
                tl.debug_barrier()
            # Read again, so that no address occupies registers during the loops.
            _chunk, start, length, _first = load_slot(grid_ptr, slots, tile // STEPS)
            _place, rows, real = tile_rows(start, length, tile % STEPS, batch_head, T, HQ, HK, G, GP, BT)
            if not IS_FIRST_PART:
                dq += load_rows(before_dq_ptr, rows, real, D, BD)
            if IS_LAST_PART:
                tl.store(weighted_ptr + rows, ratio, mask=real)
            else:
                tl.store(weighted_ptr + rows, weighted_sum, mask=real)
                tl.store(slope_ptr + rows, slope_sum, mask=real)
            store_rows(dq_ptr, dq, rows, real, D, BD)
        work = tl.atomic_add(next_ptr, 1)

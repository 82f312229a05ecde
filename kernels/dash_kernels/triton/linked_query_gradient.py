"""Gradient of the queries by links: a chunk computes its share for the tokens that selected it, then a tile adds up the
shares of its tokens' links, and the routing's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.spec import PRIOR_FLOOR, AttentionSpec, OutputGradient, Queries, QueryGradient
from dash_kernels.triton.key_rows import KeyRows, load_own_keys, starts_of
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.linked_attend import link_bias
from dash_kernels.triton.links import Links, Slab, link_offsets, linked, load_work
from dash_kernels.triton.lists import chunk_lists, list_chunks, work_counter
from dash_kernels.triton.steps import add_routing_gradient, score_gradient
from dash_kernels.triton.tiles import (
    LOG2_E,
    TileShape,
    load_rows,
    load_slot,
    mean_of_token,
    resident_programs,
    routing_factor,
    split_summaries,
    store_rows,
    summary_offset,
    tile_rows,
    token_rows,
)


def query_gradient_linked(
    queries: Queries,
    upstream: OutputGradient,
    slabs: list[Slab],
    keys: KeyRows,
    spec: AttentionSpec,
    tile: TileShape,
    before: QueryGradient,
    result: QueryGradient,
    *,
    first: bool,
    last: bool,
) -> None:
    """Add a part to `before` as `result`.

    Args:
        first: `before` is not read.
        last: the result is complete, and its weighted_sum takes the ratio.
    """
    for slab in slabs:
        links = linked(queries, keys, slab, spec)
        partial = _of_chunks(queries, upstream, links, keys, spec, tile)
        _add_up(queries, upstream, links, keys, spec, tile, partial, before, result, first=first, last=last)


def _of_chunks(
    queries: Queries, upstream: OutputGradient, links: Links, keys: KeyRows, spec: AttentionSpec, tile: TileShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [links, G, D] without the routing's share, slopes u [links, G] and dp [links] of each link, by slot."""
    q, routing = queries.q, queries.routing
    options = launch_options("query_gradient_linked", q)
    rows = max(links.slab.links, 1), tile.group
    dq = torch.empty(*rows, tile.head_dim, dtype=torch.float32, device=q.device)
    slopes, dp = torch.empty(rows, dtype=torch.float32, device=q.device), torch.empty(rows[0], device=q.device)
    work = links.work()
    programs = min(resident_programs(q.device, options.resident), len(work.segment))
    query_gradient_linked_kernel[(programs,)](
        upstream.grad.contiguous(), q.contiguous(), keys.k, keys.v, keys.starts, queries.summaries, routing.tau,
        routing.log_mean, upstream.lse, upstream.delta, links.slots, links.tokens, links.bounds, work.segment,
        work.firsts, work_counter(q.device), dq, slopes, dp, q.shape[1], keys.tokens, queries.summaries.shape[1],
        len(work.segment), links.segments, routing_factor(spec), spec.scale * LOG2_E.value, spec.prior_exponent,
        spec.scale, PRIOR_FLOOR, BC=triton.next_power_of_2(spec.chunk_size), HAS_SIGMA=spec.prior_sigma is not None,
        BLOCKS=keys.blocks, LISTED=routing.lists is not None, MOST=work.most,
        **(tile.constants | {"BT": max(options.rows // tile.padded_group, 1)}), **options.launch,
    )  # fmt: skip
    return dq, slopes, dp


def _add_up(
    queries: Queries,
    upstream: OutputGradient,
    links: Links,
    keys: KeyRows,
    spec: AttentionSpec,
    tile: TileShape,
    partial: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    before: QueryGradient,
    result: QueryGradient,
    *,
    first: bool,
    last: bool,
) -> None:
    q, slab, routing = queries.q, links.slab, queries.routing
    n, kv_heads = queries.summaries.shape[1:3]
    options = launch_options("add_linked", q)
    tiles = (slab.last_slot - slab.first_slot) * tile.per_chunk
    programs = min(resident_programs(q.device, options.resident), tiles * q.shape[0] * kv_heads)
    add_linked_kernel[(programs,)](
        upstream.grad.contiguous(), q.contiguous(), queries.chunks.on(q.device), keys.k, keys.v, keys.starts,
        queries.summaries, *split_summaries(queries.summaries, q.dtype), routing.tau, routing.masks, upstream.lse,
        upstream.delta, links.begins, links.held, links.chunks, *partial, chunk_lists(programs, n, q.device),
        work_counter(q.device), before.dq, before.weighted_sum, before.slope_sum, result.dq, result.weighted_sum,
        result.slope_sum, q.shape[1], keys.tokens, n, len(queries.chunks), slab.first_slot, tiles, slab.first_token,
        slab.tokens, q.shape[0] * kv_heads, routing_factor(spec), spec.scale * LOG2_E.value, spec.scale,
        spec.routing_logit_scale, BC=triton.next_power_of_2(spec.chunk_size), BN=options.block, BLOCKS=keys.blocks,
        IS_FIRST_PART=first, IS_LAST_PART=last, LISTED=routing.lists is not None, **tile.constants, **options.launch,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S", "n", "pieces", "segments"])
def query_gradient_linked_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, starts_ptr, summary_ptr, tau_ptr, log_mean_ptr, lse_ptr, delta_ptr, slot_ptr,
    token_ptr, bounds_ptr, segment_ptr, firsts_ptr, next_ptr, dq_ptr, slope_ptr, dp_ptr, T, S, n, pieces, segments,
    factor, scale2, prior_exponent, scale, prior_floor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HAS_SIGMA: tl.constexpr, BLOCKS: tl.constexpr,
    LISTED: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BT * GP)
    column = tl.arange(0, BD)
    work = tl.atomic_add(next_ptr, 1)
    while work < pieces:
        if tl.load(segment_ptr + work) < segments:
            segment, _piece, begin, end = load_work(segment_ptr, firsts_ptr, bounds_ptr, work, MOST)
            batch_head = segment // n
            start = tl.load(starts_of(starts_ptr, batch_head, n, BLOCKS) + segment % n)
            k, v = load_own_keys(k_ptr, v_ptr, start, C, batch_head, S, HK, BC, D, BD, BLOCKS)
            at_summary = summary_ptr + summary_offset(segment % n, batch_head, n, HK, D)
            summary = tl.load(at_summary + column, mask=column < D, other=0.0)
            # Read a step ahead: what the loads of the next step address must be at hand when they start.
            next_token = tl.load(token_ptr + begin + row // GP, mask=begin + row // GP < end, other=0)
            for at in range(begin, end, BT):
                listed = at + row // GP
                real = (listed < end) & (row % GP < G)
                token = next_token
                next_token = tl.load(token_ptr + listed + BT, mask=listed + BT < end, other=0)
                slot = tl.load(slot_ptr + listed, mask=listed < end, other=0)
                rows = token_rows(token, row % GP, batch_head, T, HQ, HK, G)
                q = load_rows(q_ptr, rows, real, D, BD)
                grad = load_rows(grad_ptr, rows, real, D, BD)
                lse2 = tl.load(lse_ptr + rows, mask=real, other=float("inf")) * LOG2_E  # weigh nothing
                delta = tl.load(delta_ptr + rows, mask=real, other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
                if not LISTED:
                    slopes, prior, bias = link_bias(
                        q, summary, tau_ptr, log_mean_ptr, rows, token, real, listed < end, batch_head, T, factor,
                        HK, G, GP, BT, HAS_SIGMA,
                    )  # fmt: skip
                    scores += (bias * prior_exponent)[:, None]
                if BC != C:
                    scores = tl.where((tl.arange(0, BC) < C)[None, :], scores, -float("inf"))
                dscores = score_gradient(scores, grad, v, lse2, delta)
                dq = tl.dot(dscores.to(k.dtype), k, input_precision="tf32x3") * scale
                at_row = slot.to(tl.int64) * G + row % GP
                store_rows(dq_ptr, dq, at_row, real, D, BD)
                if not LISTED:
                    dbias = mean_of_token(tl.sum(dscores, axis=1), G, GP, BT)  # dB / G
                    dp = dbias * prior_exponent / tl.maximum(prior, prior_floor)
                    tl.store(slope_ptr + at_row, slopes, mask=real)
                    tl.store(dp_ptr + slot, dp, mask=real & (row % GP == 0))
        work = tl.atomic_add(next_ptr, 1)


@triton.jit(
    do_not_specialize=["T", "S", "n", "slots", "first_slot", "tiles", "first_token", "tokens", "batch_heads"]
)  # fmt: skip
def add_linked_kernel(
    grad_ptr, q_ptr, grid_ptr, k_ptr, v_ptr, starts_ptr, summary_ptr, high_ptr, low_ptr, tau_ptr, mask_ptr, lse_ptr,
    delta_ptr, begin_ptr, held_ptr, chunk_ptr, share_ptr, link_slope_ptr, link_dp_ptr, list_ptr, next_ptr,
    before_dq_ptr, before_weighted_ptr, before_slope_ptr, dq_ptr, weighted_ptr, slope_ptr, T, S, n, slots, first_slot,
    tiles, first_token, tokens, batch_heads, factor, scale2, scale, logit_scale,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
    IS_FIRST_PART: tl.constexpr, IS_LAST_PART: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = BT * GP
    STEPS: tl.constexpr = C // BT
    head = tl.arange(0, M) % GP
    ids_ptr = list_ptr + tl.program_id(0).to(tl.int64) * 2 * n
    work = tl.atomic_add(next_ptr, 1)
    while work < tiles * batch_heads:
        batch_head, step = work // tiles, work % tiles % STEPS
        slot = first_slot + work % tiles // STEPS
        chunk, start, length, first = load_slot(grid_ptr, slots, slot)
        if step * BT < length:
            place, rows, real = tile_rows(start, length, step, batch_head, T, HQ, HK, G, GP, BT)
            q = load_rows(q_ptr, rows, real, D, BD)
            dq = tl.zeros([M, BD], tl.float32)
            own = tl.load(starts_of(starts_ptr, batch_head, n, BLOCKS) + chunk)
            if own >= 0:
                grad = load_rows(grad_ptr, rows, real, D, BD)
                lse2 = tl.load(lse_ptr + rows, mask=real, other=float("inf")) * LOG2_E  # weigh nothing
                delta = tl.load(delta_ptr + rows, mask=real, other=0.0)
                k, v = load_own_keys(k_ptr, v_ptr, own, length, batch_head, S, HK, BC, D, BD, BLOCKS)
                scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
                scores = tl.where(tl.arange(0, BC)[None, :] <= place[:, None], scores, -float("inf"))
                dscores = score_gradient(scores, grad, v, lse2, delta)
                dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="tf32x3") * scale
            if not IS_FIRST_PART:
                dq += load_rows(before_dq_ptr, rows, real, D, BD)
            at_token = link_offsets(start + place, batch_head, first_token, tokens, HK)
            begin = tl.load(begin_ptr + at_token, mask=real, other=0)
            held = tl.load(held_ptr + at_token, mask=real, other=0)
            most = tl.max(held, axis=0)
            # The routing's share is dz . s with dz = u (dp - ratio); ratio is known only when all parts have been met.
            weighted_sum = tl.zeros([M], tl.float32)
            slope_sum = tl.zeros([M], tl.float32)
            if not IS_FIRST_PART:
                weighted_sum += tl.load(before_weighted_ptr + rows, mask=real, other=0.0)
                slope_sum += tl.load(before_slope_ptr + rows, mask=real, other=0.0)
            if not LISTED:
                for index in range(0, most):
                    here = index < held
                    slopes = tl.load(link_slope_ptr + (begin + index).to(tl.int64) * G + head, mask=here, other=0.0)
                    weighted_sum += slopes * tl.load(link_dp_ptr + begin + index, mask=here, other=0.0)
                    slope_sum += slopes
            ratio = tl.zeros([M], tl.float32)
            if IS_LAST_PART:
                ratio = weighted_sum / tl.where(slope_sum > 0, slope_sum, 1.0)
            for index in range(0, most):
                here = index < held
                at_row = (begin + index).to(tl.int64) * G + head
                dq += load_rows(share_ptr, at_row, here, D, BD)
                if not LISTED:
                    slopes = tl.load(link_slope_ptr + at_row, mask=here, other=0.0)
                    dp = tl.load(link_dp_ptr + begin + index, mask=here, other=0.0)
                    linked = tl.load(chunk_ptr + begin + index, mask=here, other=0)
                    summary = load_rows(summary_ptr, summary_offset(linked, batch_head, n, HK, 1), here, D, BD)
                    dq += (slopes * (dp - ratio) * logit_scale)[:, None] * summary
            if IS_LAST_PART and not IS_FIRST_PART and not LISTED:
                # The chunks of the parts before have had their share of dp, and wait for that of the ratio.
                tau = tl.load(tau_ptr + rows, mask=real, other=float("inf"))
                mask_row = mask_ptr + (batch_head.to(tl.int64) * slots * STEPS + slot * STEPS + step) * ((n + 31) // 32)
                starts = starts_of(starts_ptr, batch_head, n, BLOCKS)
                count = list_chunks(mask_row, (n + 31) // 32, starts, ids_ptr, ids_ptr + n, first, chunk, False, 1)
                for block in range(0, count, BN):
                    listed = block + tl.arange(0, BN)
                    ids = tl.load(ids_ptr + listed, mask=listed < count, other=0)
                    centred = tl.zeros([M, BN], tl.float32) - ratio[:, None]
                    dq = add_routing_gradient(
                        dq, centred, q, high_ptr, low_ptr, ids, listed < count, batch_head, n, tau, factor, logit_scale,
                        HK, D, BD,
                    )  # fmt: skip
                tl.debug_barrier()  # the list is written anew
            if IS_LAST_PART:
                tl.store(weighted_ptr + rows, ratio, mask=real)
            else:
                tl.store(weighted_ptr + rows, weighted_sum, mask=real)
                tl.store(slope_ptr + rows, slope_sum, mask=real)
            store_rows(dq_ptr, dq, rows, real, D, BD)
        work = tl.atomic_add(next_ptr, 1)

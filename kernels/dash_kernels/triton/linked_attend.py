"""Stage 3 by links, forward: a chunk attends to the tokens that selected it, then a tile merges the results of its
tokens' links with that of its own chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.spec import AttentionSpec, Queries
from dash_kernels.triton.key_rows import KeyRows, load_own_keys, starts_of
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.links import Links, Slab, link_offsets, linked, load_work
from dash_kernels.triton.lists import work_counter
from dash_kernels.triton.steps import NOTHING, softmax_step
from dash_kernels.triton.tiles import (
    LEAST_PRIOR,
    LN_2,
    LOG2_E,
    TileShape,
    load_rows,
    load_slot,
    mean_of_token,
    resident_programs,
    routing_factor,
    store_rows,
    summary_offset,
    tile_rows,
    token_offsets,
    token_rows,
)


def attend_linked(
    queries: Queries,
    slabs: list[Slab],
    keys: KeyRows,
    spec: AttentionSpec,
    tile: TileShape,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write `out` and `lse` of `attend`."""
    for slab in slabs:
        links = linked(queries, keys, slab, spec)
        partial_out, partial_lse = _attend_chunks(queries, links, keys, spec, tile)
        _merge(queries, links, keys, spec, tile, partial_out, partial_lse, before, out, lse)


def _attend_chunks(
    queries: Queries, links: Links, keys: KeyRows, spec: AttentionSpec, tile: TileShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [links, G, D] and log-sum-exp in base 2 [links, G] of each link, by slot."""
    q, routing = queries.q, queries.routing
    n = queries.summaries.shape[1]
    options = launch_options("attend_linked", q)
    rows = max(links.slab.links, 1), tile.group
    partial_out = torch.empty(*rows, tile.head_dim, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    work = links.work()
    programs = min(resident_programs(q.device, options.resident), len(work.segment))
    attend_linked_kernel[(programs,)](
        q.contiguous(), keys.k, keys.v, keys.starts, queries.summaries, routing.tau, routing.log_mean,
        links.slots, links.tokens, links.bounds, work.segment, work.firsts, work_counter(q.device), partial_out,
        partial_lse, q.shape[1], keys.tokens, n, len(work.segment), links.segments, routing_factor(spec),
        spec.scale * LOG2_E.value, spec.prior_exponent, BC=triton.next_power_of_2(spec.chunk_size),
        HAS_SIGMA=spec.prior_sigma is not None, BLOCKS=keys.blocks, LISTED=routing.lists is not None,
        MOST=work.most, **(tile.constants | {"BT": max(options.rows // tile.padded_group, 1)}), **options.launch,
    )  # fmt: skip
    return partial_out, partial_lse


def _merge(
    queries: Queries,
    links: Links,
    keys: KeyRows,
    spec: AttentionSpec,
    tile: TileShape,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    q, slab = queries.q, links.slab
    n, kv_heads = queries.summaries.shape[1:3]
    options = launch_options("merge_linked", q)
    slots = slab.last_slot - slab.first_slot
    before_out, before_lse = (out, lse) if before is None else before
    merge_linked_kernel[(slots * tile.per_chunk, q.shape[0] * kv_heads)](
        q.contiguous(), queries.chunks.on(q.device), keys.k, keys.v, keys.starts, links.begins, links.held, partial_out,
        partial_lse, before_out, before_lse, out, lse, q.shape[1], keys.tokens, n, len(queries.chunks), slab.first_slot,
        slab.first_token, slab.tokens, spec.scale * LOG2_E.value, BC=triton.next_power_of_2(spec.chunk_size),
        BLOCKS=keys.blocks, IS_FIRST_PART=before is None, **tile.constants, **options.launch,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S", "n", "pieces", "segments"])
def attend_linked_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, summary_ptr, tau_ptr, log_mean_ptr, slot_ptr, token_ptr, bounds_ptr, segment_ptr,
    firsts_ptr, next_ptr, out_ptr, lse_ptr, T, S, n, pieces, segments, factor, scale2, prior_exponent,
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
                raw = tl.dot(q, tl.trans(k), input_precision="tf32x3")  # [M, BC]
                scores = raw * scale2
                if not LISTED:
                    _slopes, _prior, bias = link_bias(
                        q, summary, tau_ptr, log_mean_ptr, rows, token, real, listed < end, batch_head, T,
                        factor, HK, G, GP, BT, HAS_SIGMA,
                    )  # fmt: skip
                    scores += (bias * prior_exponent)[:, None]
                if BC != C:
                    scores = tl.where((tl.arange(0, BC) < C)[None, :], scores, -float("inf"))
                top = tl.max(scores, axis=1)
                weights = tl.exp2(scores - top[:, None])
                total = tl.sum(weights, axis=1)
                out = tl.dot(weights.to(v.dtype), v, input_precision="tf32x3") / total[:, None]
                at_row = slot.to(tl.int64) * G + row % GP
                store_rows(out_ptr, out, at_row, real, D, BD)
                tl.store(lse_ptr + at_row, top + tl.log2(total), mask=real)
        work = tl.atomic_add(next_ptr, 1)


@triton.jit
def link_bias(
    q, summary, tau_ptr, log_mean_ptr, rows, token, real, token_real, batch_head, T, factor,
    HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, HAS_SIGMA: tl.constexpr,
):  # fmt: skip
    """(slopes u = sqrt(p), prior of the token, bias in base 2 before the prior's exponent) of links.  [M] each

    summary: of the chunk, float32 [BD].
    """
    tau = tl.load(tau_ptr + rows, mask=real, other=float("inf"))  # padding rows select nothing
    slopes = tl.maximum(tl.sum(q.to(tl.float32) * summary[None, :], axis=1) * factor - tau, 0.0)
    prior = mean_of_token(slopes * slopes, G, GP, BT)
    bias = tl.log2(tl.maximum(prior, LEAST_PRIOR))
    if HAS_SIGMA:
        offset = token_offsets(token, batch_head, T, HK)
        bias -= tl.load(log_mean_ptr + offset, mask=token_real, other=0.0) / LN_2
    return slopes, prior, bias


@triton.jit(do_not_specialize=["T", "S", "n", "slots", "first_slot", "first_token", "tokens"])
def merge_linked_kernel(
    q_ptr, grid_ptr, k_ptr, v_ptr, starts_ptr, begin_ptr, held_ptr, partial_out_ptr, partial_lse_ptr, before_out_ptr,
    before_lse_ptr, out_ptr, lse_ptr, T, S, n, slots, first_slot, first_token, tokens, scale2,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr, IS_FIRST_PART: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = BT * GP
    STEPS: tl.constexpr = C // BT
    batch_head, step = tl.program_id(1), tl.program_id(0) % STEPS
    chunk, start, length, _first = load_slot(grid_ptr, slots, first_slot + tl.program_id(0) // STEPS)
    if step * BT < length:
        place, rows, real = tile_rows(start, length, step, batch_head, T, HQ, HK, G, GP, BT)
        if IS_FIRST_PART:
            top = tl.full([M], NOTHING, tl.float32)
            total = tl.zeros([M], tl.float32)
            out = tl.zeros([M, BD], tl.float32)
        else:
            # The log-sum-exp as the maximum makes the output so far one of weight 1.
            before = tl.load(before_lse_ptr + rows, mask=real, other=-float("inf"))
            met = before > -float("inf")
            top = tl.where(met, before * LOG2_E, NOTHING)
            total = met.to(tl.float32)
            out = load_rows(before_out_ptr, rows, real, D, BD).to(tl.float32)
        own = tl.load(starts_of(starts_ptr, batch_head, n, BLOCKS) + chunk)
        if own >= 0:
            q = load_rows(q_ptr, rows, real, D, BD)
            k, v = load_own_keys(k_ptr, v_ptr, own, length, batch_head, S, HK, BC, D, BD, BLOCKS)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
            scores = tl.where(tl.arange(0, BC)[None, :] <= place[:, None], scores, -float("inf"))
            top, total, out = softmax_step(scores, v, top, total, out)
        at_token = link_offsets(start + place, batch_head, first_token, tokens, HK)
        begin = tl.load(begin_ptr + at_token, mask=real, other=0)
        held = tl.load(held_ptr + at_token, mask=real, other=0)
        head = tl.arange(0, M) % GP
        for index in range(0, tl.max(held, axis=0)):
            here = index < held
            at_row = (begin + index).to(tl.int64) * G + head
            lse = tl.load(partial_lse_ptr + at_row, mask=here, other=-float("inf"))
            partial = load_rows(partial_out_ptr, at_row, here, D, BD)
            new_top = tl.maximum(top, lse)
            weight = tl.exp2(lse - new_top)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + weight
            out = out * shrink[:, None] + partial.to(tl.float32) * weight[:, None]
            top = new_top
        met = total > 0
        out = out / tl.where(met, total, 1.0)[:, None]
        store_rows(out_ptr, out, rows, real, D, BD)
        lse = tl.where(met, (top + tl.log2(tl.where(met, total, 1.0))) * LN_2, -float("inf"))
        tl.store(lse_ptr + rows, lse, mask=real)

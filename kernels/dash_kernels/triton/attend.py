"""Stage 3 in Triton, forward: a tile of queries attends to its own chunk, then walks the list of chunks that any of its
tokens selected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.gluon_sm90.launch import pair_options
from dash_kernels.spec import AttentionSpec, Blocks, Part, Queries
from dash_kernels.triton.key_rows import KeyRows, load_keys, load_own_keys, starts_of
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.lists import chunk_lists, list_chunks, work_counter
from dash_kernels.triton.steps import NOTHING, softmax_step
from dash_kernels.triton.tiles import (
    LN_2,
    LOG2_E,
    TileShape,
    column_of,
    list_arguments,
    listed_hits,
    load_rows,
    load_slot,
    mean_over_group,
    prior_bias,
    resident_programs,
    routing_factor,
    routing_scores,
    split_summaries,
    store_rows,
    tile_rows,
    to_rows,
    token_offsets,
)


def attend(
    queries: Queries,
    part: Part | Blocks,
    spec: AttentionSpec,
    *,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, chunks, summaries, routing = queries.q, queries.chunks, queries.summaries, queries.routing
    n, kv_heads = summaries.shape[1:3]
    tile = TileShape.of(q, kv_heads, spec)
    out = torch.empty(q.shape, dtype=q.dtype if last else torch.float32, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    keys = KeyRows.of(part, summaries.shape, tile)
    in_pairs = pair_options("attend", q, tile, chunks)
    if in_pairs is not None and keys.aligned and routing.lists is None:
        from dash_kernels.gluon_sm90.attend import attend_pairs  # Gluon is not in every Triton

        attend_pairs(queries, keys, spec, tile, in_pairs, before, out, lse)
        return out, lse
    options = launch_options("attend", q)
    k_map, v_map, maps = keys.maps(tile, options)
    tiles = len(chunks) * tile.per_chunk
    programs = min(resident_programs(q.device, options.resident), tiles * q.shape[0] * kv_heads)
    before_out, before_lse = (out, lse) if before is None else before
    attend_kernel[(programs,)](
        q.contiguous(), chunks.on(q.device), keys.k, keys.v, k_map, v_map, keys.starts,
        *split_summaries(summaries, q.dtype), routing.tau, routing.log_mean, routing.masks,
        chunk_lists(programs, n, q.device), work_counter(q.device), before_out, before_lse, out, lse,
        *list_arguments(routing), q.shape[1], keys.tokens, n, len(chunks), q.shape[0] * kv_heads,
        routing_factor(spec), spec.scale * LOG2_E.value, spec.prior_exponent, 1.0,
        BC=triton.next_power_of_2(spec.chunk_size), BN=options.block, HAS_SIGMA=spec.prior_sigma is not None,
        MAPS=maps, BLOCKS=keys.blocks, IS_FIRST_PART=before is None, LISTED=routing.lists is not None,
        **tile.constants, **options.launch,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["width", "T", "S", "n", "slots", "batch_heads"])
def attend_kernel(
    q_ptr, grid_ptr, k_ptr, v_ptr, k_map, v_map, starts_ptr, high_ptr, low_ptr, tau_ptr, log_mean_ptr, mask_ptr,
    list_ptr, next_ptr, before_out_ptr, before_lse_ptr, out_ptr, lse_ptr, lists_ptr, width, T, S, n, slots, batch_heads,
    factor, scale2, prior_exponent, one,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_SIGMA: tl.constexpr,
    MAPS: tl.constexpr, BLOCKS: tl.constexpr, IS_FIRST_PART: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = BT * GP
    STEPS: tl.constexpr = C // BT
    tiles = slots * STEPS
    words = (n + 31) // 32
    ids_ptr = list_ptr + tl.program_id(0).to(tl.int64) * 2 * n
    list_starts_ptr = ids_ptr + n
    work = tl.atomic_add(next_ptr, 1)  # handed out one by one: lists differ in length
    while work < tiles * batch_heads:
        batch_head = work // tiles
        tile = tiles - 1 - work % tiles  # late chunks have the longest lists: they go first
        chunk, start, length, first = load_slot(grid_ptr, slots, tile // STEPS)
        if tile % STEPS * BT < length:
            place, rows, real = tile_rows(start, length, tile % STEPS, batch_head, T, HQ, HK, G, GP, BT)
            q = load_rows(q_ptr, rows, real, D, BD)
            if not LISTED:
                tau = tl.load(tau_ptr + rows, mask=real, other=float("inf"))  # padding rows select nothing
                log2_mean = load_log2_mean(log_mean_ptr, start, tile % STEPS, length, batch_head, T, HK, BT, HAS_SIGMA)
            mask_row = mask_ptr + (batch_head.to(tl.int64) * tiles + tile) * words
            starts = starts_of(starts_ptr, batch_head, n, BLOCKS)
            count = list_chunks(mask_row, words, starts, ids_ptr, list_starts_ptr, first, chunk, True, 1)

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
                out = load_rows(before_out_ptr, rows, real, D, BD)
            own = tl.load(starts + chunk)
            if own >= 0:
                k, v = load_own_keys(k_ptr, v_ptr, own, length, batch_head, S, HK, BC, D, BD, BLOCKS)
                scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
                scores = tl.where(tl.arange(0, BC)[None, :] <= place[:, None], scores, -float("inf"))
                top, total, out = softmax_step(scores, v, top, total, out)
            if LISTED:
                out *= one  # ends the product here, as in the query gradient; else that of the priors does
            for block in range(0, count, BN):
                listed = block + tl.arange(0, BN)
                ids = tl.load(ids_ptr + listed, mask=listed < count, other=0)
                if LISTED:
                    bias = listed_bias(
                        lists_ptr, width, ids, listed < count, start, tile % STEPS, length, batch_head, T,
                        HK, GP, BT, BN,
                    )  # fmt: skip
                else:
                    _slopes, _prior, bias = routing_block(
                        q, high_ptr, low_ptr, ids, listed < count, batch_head, n, tau, log2_mean, factor,
                        prior_exponent, HK, G, GP, BT, D, BD, BN,
                    )  # fmt: skip
                for index in range(0, tl.minimum(count - block, BN)):
                    at = tl.load(list_starts_ptr + block + index)
                    k, v = load_keys(k_ptr, v_ptr, k_map, v_map, at, batch_head, S, HK, C, BC, D, BD, MAPS, BLOCKS)
                    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
                    scores += column_of(bias, index, BN)[:, None]
                    if BC != C:
                        scores = tl.where((tl.arange(0, BC) < C)[None, :], scores, -float("inf"))
                    top, total, out = softmax_step(scores, v, top, total, out)
            tl.debug_barrier()  # the list is written anew for the next tile
            # Read again, so that no address occupies registers during the loop.
            _chunk, start, length, _first = load_slot(grid_ptr, slots, tile // STEPS)
            _place, rows, real = tile_rows(start, length, tile % STEPS, batch_head, T, HQ, HK, G, GP, BT)
            met = total > 0
            out = out / tl.where(met, total, 1.0)[:, None]
            store_rows(out_ptr, out, rows, real, D, BD)
            lse = tl.where(met, (top + tl.log2(tl.where(met, total, 1.0))) * LN_2, -float("inf"))
            tl.store(lse_ptr + rows, lse, mask=real)
        work = tl.atomic_add(next_ptr, 1)


@triton.jit
def routing_block(
    q, high_ptr, low_ptr, ids, mask, batch_head, n, tau, log2_mean, factor, prior_exponent,
    HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """(slopes u = sqrt(p) [M, BN], prior [BT, BN], bias in base 2 [M, BN], -inf where a token did not select the chunk)
    of the tile for BN chunks.
    """
    y, _high = routing_scores(q, high_ptr, low_ptr, ids, mask, batch_head, n, HK, D, BD, True)
    slopes = tl.where(mask[None, :], tl.maximum(y * factor - tau[:, None], 0.0), 0.0)
    prior = mean_over_group(slopes * slopes, G, GP, BT, BN)
    return slopes, prior, to_rows(prior_bias(prior, log2_mean[:, None], prior_exponent), GP, BT, BN)


@triton.jit
def listed_bias(
    lists_ptr, width, ids, mask, start, step, length, batch_head, T,
    HK: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bias of a tile for BN chunks: 0, or -inf where a token's list lacks the chunk.  [M, BN]"""
    hits = listed_hits(lists_ptr, width, ids, mask, start, step, length, batch_head, T, HK, BT, BN)
    return to_rows(tl.where(hits > 0, 0.0, -float("inf")), GP, BT, BN)


@triton.jit
def load_log2_mean(
    log_mean_ptr, start, step, length, batch_head, T, HK: tl.constexpr, BT: tl.constexpr, HAS_SIGMA: tl.constexpr
):
    """Mean of log2 P of a tile's tokens.  [BT]"""
    if HAS_SIGMA:
        place = step * BT + tl.arange(0, BT)
        offset = token_offsets(start + place, batch_head, T, HK)
        log2_mean = tl.load(log_mean_ptr + offset, mask=place < length, other=0.0) / LN_2
    else:
        log2_mean = tl.zeros([BT], tl.float32)
    return log2_mean

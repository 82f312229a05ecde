"""Gradients of keys and values by links: as `key_gradient`, but a chunk finds its tokens in a list of all links."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.spec import PRIOR_FLOOR, AttentionSpec, OutputGradient, Queries
from dash_kernels.triton.key_rows import KeyRows, load_own_keys, starts_of
from dash_kernels.triton.key_steps import add_rows, add_to_chunk, own_gradient
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.links import Slab, linked, load_work
from dash_kernels.triton.lists import work_counter
from dash_kernels.triton.summarize import summary_weights
from dash_kernels.triton.tiles import LOG2_E, TileShape, load_slot, resident_programs, routing_factor, token_rows


def key_gradient_linked(
    queries: Queries,
    upstream: OutputGradient,
    ratio: torch.Tensor,
    slabs: list[Slab],
    keys: KeyRows,
    summary_query: torch.Tensor,
    spec: AttentionSpec,
    tile: TileShape,
    padded_chunk: int,
    dk: torch.Tensor,
    dv: torch.Tensor,
    shares: torch.Tensor,
) -> None:
    """Add to the gradients of keys and values, as `keys` addresses them, and to the chunks' shares of summary_query's.

    Args:
        padded_chunk: columns of a product with keys.
        shares: float32 [B, n, Hkv, D].
    """
    q, grid, routing = queries.q, queries.chunks, queries.routing
    n = queries.summaries.shape[1]
    options = launch_options("key_gradient_linked", q)
    own_slots = grid.slots_by_id(n, q.device)
    held = keys.starts.view(-1, n) >= 0
    for slab in slabs:
        links = linked(queries, keys, slab, spec)
        own_here = (own_slots >= slab.first_slot) & (own_slots < slab.last_slot)
        work = links.work((own_here & held).expand(links.segments // n, n).flatten())
        programs = min(resident_programs(q.device, options.resident), len(work.segment))
        turns = torch.zeros(links.segments, dtype=torch.int32, device=q.device)
        key_gradient_linked_kernel[(programs,)](
            upstream.grad.contiguous(), q.contiguous(), grid.on(q.device), own_slots, keys.k, keys.v, keys.starts,
            summary_query.contiguous(), routing.tau, routing.log_mean, upstream.lse, upstream.delta, ratio,
            links.tokens, links.bounds, work.segment, work.firsts, work_counter(q.device), turns, dk, dv, shares,
            q.shape[1], keys.tokens, n, len(grid), slab.first_slot, slab.last_slot, len(work.segment), links.segments,
            routing_factor(spec), spec.scale * LOG2_E.value, spec.prior_exponent, spec.scale, spec.routing_logit_scale,
            PRIOR_FLOOR, BC=padded_chunk, HAS_SIGMA=spec.prior_sigma is not None, BLOCKS=keys.blocks,
            LISTED=routing.lists is not None, MOST=work.most,
            **(tile.constants | {"BT": max(options.rows // tile.padded_group, 1)}), **options.launch,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S", "n", "slots", "first_slot", "last_slot", "pieces", "segments"])
def key_gradient_linked_kernel(
    grad_ptr, q_ptr, grid_ptr, own_slots_ptr, k_ptr, v_ptr, starts_ptr, query_ptr, tau_ptr, log_mean_ptr, lse_ptr,
    delta_ptr, ratio_ptr, token_ptr, bounds_ptr, segment_ptr, firsts_ptr, next_ptr, turns_ptr, dk_ptr, dv_ptr,
    share_ptr, T, S, n, slots, first_slot, last_slot, pieces, segments,
    factor, scale2, prior_exponent, scale, logit_scale, prior_floor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HAS_SIGMA: tl.constexpr, BLOCKS: tl.constexpr,
    LISTED: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BD)
    row = tl.arange(0, BT * GP)
    HALF: tl.constexpr = BT * GP // 16
    # Work is handed out in order, so a program that waits for its turn waits for a running one.
    work = tl.atomic_add(next_ptr, 1)
    while work < pieces:
        if tl.load(segment_ptr + work) < segments:
            segment, piece, begin, end = load_work(segment_ptr, firsts_ptr, bounds_ptr, work, MOST)
            batch_head = segment // n
            chunk = segment % n
            key_start = tl.load(starts_of(starts_ptr, batch_head, n, BLOCKS) + chunk)
            own = tl.load(own_slots_ptr + chunk)
            own_here = (piece == 0) & (own >= first_slot) & (own < last_slot)
            length = own_length(grid_ptr, slots, own, C)
            k, v = load_own_keys(k_ptr, v_ptr, key_start, length, batch_head, S, HK, BC, D, BD, BLOCKS)
            query = tl.load(query_ptr + (batch_head % HK) * D + column, mask=column < D, other=0.0).to(tl.float32)
            summary_weight = summary_weights(k.to(tl.float32), query, scale, C, BC)
            dk = tl.zeros([BD, BC], tl.float32)
            dv = tl.zeros([BD, BC], tl.float32)
            along = tl.zeros([HALF, 8, BC], tl.float32)
            if own_here:
                _chunk, start, _length, _first = load_slot(grid_ptr, slots, own)
                dk, dv = own_gradient(
                    grad_ptr, q_ptr, lse_ptr, delta_ptr, k, v, dk, dv, start, length, batch_head, T, scale2,
                    HQ, HK, G, GP, BT, BC, D, BD,
                )  # fmt: skip
            # Read a step ahead: what the loads of the next step address must be at hand when they start.
            next_token = tl.load(token_ptr + begin + row // GP, mask=begin + row // GP < end, other=0)
            for at in range(begin, end, BT):
                listed = at + row // GP
                real = (listed < end) & (row % GP < G)
                token = next_token
                next_token = tl.load(token_ptr + listed + BT, mask=listed + BT < end, other=0)
                rows = token_rows(token, row % GP, batch_head, T, HQ, HK, G)
                dk, dv, along = add_rows(
                    grad_ptr, q_ptr, tau_ptr, log_mean_ptr, lse_ptr, delta_ptr, ratio_ptr, k, v, summary_weight, dk, dv,
                    along, rows, token, real, listed < end, batch_head, T, factor, scale2, prior_exponent, scale,
                    logit_scale, prior_floor, HK, G, GP, BT, C, BC, D, BD, HAS_SIGMA, LISTED,
                )  # fmt: skip
            # Read again, so that neither keys nor addresses occupy registers during the loop.
            segment, piece, _begin, _end = load_work(segment_ptr, firsts_ptr, bounds_ptr, work, MOST)
            key_start = tl.load(starts_of(starts_ptr, segment // n, n, BLOCKS) + segment % n)
            length = own_length(grid_ptr, slots, tl.load(own_slots_ptr + segment % n), C)
            add_to_chunk(
                k_ptr, query_ptr, dk_ptr, dv_ptr, share_ptr, turns_ptr + segment, piece, summary_weight, dk, dv, along,
                segment % n, key_start, length, segment // n, S, n, scale, logit_scale, HK, BC, D, BD, BLOCKS,
            )  # fmt: skip
            tl.debug_barrier()  # every thread's part is written before the next piece's turn
            tl.atomic_add(turns_ptr + segment, 1)
        work = tl.atomic_add(next_ptr, 1)


@triton.jit
def own_length(grid_ptr, slots, own, C: tl.constexpr):
    """Tokens of a chunk: those of the queries' chunk at slot `own`, or C where it is none of theirs."""
    return tl.load(grid_ptr + 2 * slots + own, mask=own >= 0, other=C)

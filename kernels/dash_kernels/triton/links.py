"""Links: a token, of one KV head, and an earlier chunk that it selected. In the order of tokens and in that of chunks.

Where the tokens of a tile select different chunks, walking every chunk that any of them selected multiplies mostly
what nobody selected. With links, a chunk gathers the tokens that selected it instead, however they are scattered: no
row is multiplied in vain. Each link leaves a partial result, and a tile then merges those of its tokens.

A link's `slot` is its place in the order of tokens, where a token's links follow each other by chunk: partial results
lie in that order. The order of chunks comes from a stable sort, so it never varies. Work is done a slab of the queries
at a time, so that partial results stay within MAX_LINK_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dash_kernels.limits import MAX_LINK_BYTES
from dash_kernels.spec import AttentionSpec, Queries
from dash_kernels.triton.key_rows import KeyRows, starts_of
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.lists import chunk_lists, list_chunks, work_counter
from dash_kernels.triton.reached import walked
from dash_kernels.triton.tiles import (
    TileShape,
    list_arguments,
    listed_hits,
    load_rows,
    load_slot,
    resident_programs,
    routing_factor,
    routing_scores,
    split_summaries,
    tile_rows,
)

LINKS_OF_WORK = 512
"""Links of a chunk that a program takes at a time."""
LEAST_TOKENS = 16_384
"""Below, the device would wait for the host, which must know the number of links, for longer than links save."""
LEAST_EFFICIENCY = 0.0
"""Tile efficiency up to which links are cheaper than walking the chunks that any token of a tile selected. Never: they
save less than the waits for their number cost (docs/kernel-log.md, Links)."""


@dataclass(frozen=True)
class Slab:
    """Consecutive slots of the queries' chunks.

    first_slot, last_slot: slots, the last one not included.
    first_token, tokens:   of a sequence of the batch.
    links:                 number of links to all chunks, over batch and KV heads.
    """

    first_slot: int
    last_slot: int
    first_token: int
    tokens: int
    links: int


@dataclass(frozen=True)
class Links:
    """Links of a slab's tokens to the chunks that a part holds. A segment is a chunk of one KV head of one sequence.

    slab:     the tokens.
    begins:   int32 [B, tokens, Hkv], slot of a token's first link.
    held:     int32 [B, tokens, Hkv], number of a token's links.
    chunks:   int32 [links], chunk id by slot.
    slots:    int32 [links], in the order of segments; those beyond the last segment are of no link.
    tokens:   int32 [links], the token in its sequence, likewise.
    bounds:   int32 [segments + 1], where each segment begins in `slots`.
    """

    slab: Slab
    begins: torch.Tensor
    held: torch.Tensor
    chunks: torch.Tensor
    slots: torch.Tensor
    tokens: torch.Tensor
    bounds: torch.Tensor

    @property
    def segments(self) -> int:
        return len(self.bounds) - 1

    def work(self, least: torch.Tensor | None = None) -> Work:
        """Divide the segments into pieces of at most LINKS_OF_WORK links.

        Args:
            least: bool [segments], those that get a piece even without a link.
        """
        pieces = (self.bounds.diff() + (LINKS_OF_WORK - 1)) // LINKS_OF_WORK
        if least is not None:
            pieces = torch.maximum(pieces, least.to(pieces.dtype))
        ends = pieces.cumsum(0, dtype=torch.int32)
        most = self.slab.links // LINKS_OF_WORK + self.segments
        numbers = torch.arange(most, dtype=torch.int32, device=ends.device)
        segment = torch.searchsorted(ends, numbers, right=True, out_int32=True)
        return Work(segment, ends - pieces, LINKS_OF_WORK)


@dataclass(frozen=True)
class Work:
    """Pieces of work of a kernel whose programs take segments.

    segment: int32 [pieces at most], the segment of each; their number where there is no such piece.
    firsts:  int32 [segments], number of a segment's first piece.
    most:    links of a piece.
    """

    segment: torch.Tensor
    firsts: torch.Tensor
    most: int


def linked_slabs(queries: Queries, tile: TileShape) -> list[Slab] | None:
    """Return the slabs to compute by links; None where walking the tiles' lists is cheaper. Waits for the device."""
    grid, routing = queries.chunks, queries.routing
    selected = routing.selected
    if LEAST_EFFICIENCY == 0 or selected.shape[0] * selected.shape[1] < LEAST_TOKENS:
        return None
    of_tokens = (selected - 1).sum((0, 2)).cumsum(0)
    last_tokens = (grid.starts + grid.lengths - 1).to(selected.device)
    numbers = torch.cat((of_tokens[last_tokens], walked(routing)))
    *before, tiles = numbers.tolist()
    links = before[-1]
    if links > LEAST_EFFICIENCY * tiles * tile.tokens:
        return None
    most = MAX_LINK_BYTES // (tile.group * tile.head_dim * 4)
    return list(_divided([0, *before], [*grid.starts.tolist(), grid.tokens], most))


def _divided(before: list[int], starts: list[int], most: int) -> Iterator[Slab]:
    """before: links before each slot. starts: first token of each slot. Both with the end."""
    first, slots = 0, len(starts) - 1
    while first < slots:
        last = first + 1
        while last < slots and before[last + 1] - before[first] <= most:
            last += 1
        yield Slab(first, last, starts[first], starts[last] - starts[first], before[last] - before[first])
        first = last


def linked(queries: Queries, keys: KeyRows, slab: Slab, spec: AttentionSpec) -> Links:
    """Return the links of a slab's tokens to the chunks of a part."""
    q, grid, routing = queries.q, queries.chunks, queries.routing
    batch, n, kv_heads, _ = queries.summaries.shape
    tile = TileShape.of(q, kv_heads, spec)
    options = launch_options("route", q)
    tokens = tile.tokens
    while tokens * 2 * tile.padded_group <= options.rows and spec.chunk_size % (tokens * 2) == 0:
        tokens *= 2
    segments = batch * kv_heads * n
    room = routing.selected[:, slab.first_token : slab.first_token + slab.tokens] - 1
    ends = room.flatten().cumsum(0, dtype=torch.int32).view(room.shape)
    begins = ends - room
    held = torch.zeros_like(begins)
    segment_of = torch.full((slab.links,), segments, dtype=torch.int32, device=q.device)
    token_of = torch.zeros_like(segment_of)
    slots_here = slab.last_slot - slab.first_slot
    work = slots_here * (spec.chunk_size // tokens) * batch * kv_heads
    programs = min(resident_programs(q.device, options.resident), work)
    link_kernel[(programs,)](
        q.contiguous(), grid.on(q.device), *split_summaries(queries.summaries, q.dtype), routing.tau, routing.masks,
        keys.starts, chunk_lists(programs, n, q.device), work_counter(q.device), begins, ends, held, segment_of,
        token_of, *list_arguments(routing), q.shape[1], n, len(grid), slab.first_slot, slots_here, slab.first_token,
        slab.tokens, batch * kv_heads, routing_factor(spec), BN=options.block, TILES=tokens // tile.tokens,
        BLOCKS=keys.blocks, LISTED=routing.lists is not None, **(tile.constants | {"BT": tokens}), **options.launch,
    )  # fmt: skip
    ordered, order = segment_of.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(segments + 1, dtype=torch.int32, device=q.device), out_int32=True)
    return Links(slab, begins, held, segment_of % n, order.to(torch.int32), token_of[order], bounds)


@triton.jit(do_not_specialize=["width", "T", "n", "slots", "begin", "slab", "first_token", "tokens", "batch_heads"])
def link_kernel(
    q_ptr, grid_ptr, high_ptr, low_ptr, tau_ptr, mask_ptr, starts_ptr, list_ptr, next_ptr, begin_ptr, end_ptr, held_ptr,
    segment_ptr, token_ptr, lists_ptr, width, T, n, slots, begin, slab, first_token, tokens, batch_heads, factor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = C // BT
    words = (n + 31) // 32
    ids_ptr = list_ptr + tl.program_id(0).to(tl.int64) * 2 * n
    steps = slab * STEPS
    work = tl.atomic_add(next_ptr, 1)  # handed out one by one: lists differ in length
    while work < steps * batch_heads:
        batch_head = work // steps
        step = steps - 1 - work % steps  # late chunks have the longest lists: they go first
        slot = begin + step // STEPS
        chunk, start, length, first = load_slot(grid_ptr, slots, slot)
        if step % STEPS * BT < length:
            _place, rows, real = tile_rows(start, length, step % STEPS, batch_head, T, HQ, HK, G, GP, BT)
            if not LISTED:
                q = load_rows(q_ptr, rows, real, D, BD)
                tau = tl.load(tau_ptr + rows, mask=real, other=float("inf"))
            place = step % STEPS * BT + tl.arange(0, BT)
            at_token = link_offsets(start + place, batch_head, first_token, tokens, HK)
            next_slot = tl.load(begin_ptr + at_token, mask=place < length, other=0)
            end_slot = tl.load(end_ptr + at_token, mask=place < length, other=0)
            first_slot = next_slot
            tile = (batch_head.to(tl.int64) * slots + slot) * STEPS + step % STEPS
            starts = starts_of(starts_ptr, batch_head, n, BLOCKS)
            count = list_chunks(
                mask_ptr + tile * TILES * words, words, starts, ids_ptr, ids_ptr + n, first, chunk, True, TILES
            )
            column = tl.arange(0, BN)
            ids = tl.load(ids_ptr + column, mask=column < count, other=0)
            for at in range(0, count, BN):
                inside = at + column < count
                if LISTED:
                    hit = listed_hits(
                        lists_ptr, width, ids, inside, start, step % STEPS, length, batch_head, T, HK, BT, BN
                    )
                else:
                    y, _high = routing_scores(q, high_ptr, low_ptr, ids, inside, batch_head, n, HK, D, BD, True)
                    u = tl.maximum(tl.where(inside[None, :], y, -float("inf")) * factor - tau[:, None], 0.0)
                    hit = (tl.sum(tl.reshape(u * u, [BT, GP, BN]), axis=1) > 0).to(tl.int32)
                # Routing has counted them; should it have rounded otherwise, a link of weight 0 is left out.
                to = next_slot[:, None] + tl.cumsum(hit, axis=1) - hit
                store = (hit > 0) & (to < end_slot[:, None])
                segment = tl.broadcast_to((batch_head * n + ids)[None, :], [BT, BN])
                tl.store(segment_ptr + to, segment, mask=store)
                tl.store(token_ptr + to, tl.broadcast_to((start + place)[:, None], [BT, BN]), mask=store)
                next_slot = tl.minimum(next_slot + tl.sum(hit, axis=1), end_slot)
                # A step ahead: loads whose addresses come from a load of the same step are not fetched in advance.
                ids = tl.load(ids_ptr + at + BN + column, mask=at + BN + column < count, other=0)
            tl.store(held_ptr + at_token, next_slot - first_slot, mask=place < length)
            tl.debug_barrier()  # the list is written anew
        work = tl.atomic_add(next_ptr, 1)


@triton.jit
def link_offsets(token, batch_head, first_token, tokens, HK: tl.constexpr):
    """Index into [B, tokens of the slab, HK] of tokens, int64."""
    return ((batch_head // HK).to(tl.int64) * tokens + token - first_token) * HK + batch_head % HK


@triton.jit
def load_work(segment_ptr, firsts_ptr, bounds_ptr, work, MOST: tl.constexpr):
    """(segment, number among the pieces of its segment, first and last + 1 of its links in their order)."""
    segment = tl.load(segment_ptr + work)
    piece = work - tl.load(firsts_ptr + segment)
    begin = tl.load(bounds_ptr + segment) + piece * MOST
    end = tl.minimum(begin + MOST, tl.load(bounds_ptr + segment + 1))
    return segment, piece, begin, end

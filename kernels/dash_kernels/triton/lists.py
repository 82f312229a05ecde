"""From bits to lists: what a program walks. Lists lie in memory, in a scratch row of each resident program, because
Triton can only fetch ahead what it finds by a loop's counter.

A tile's bits (written by routing) become a list of chunks. The other way round, the queries of a chunk, is not kept in
memory: a slab of the queries at a time, `query_bits_kernel` finds out which tokens of a tile selected its chunks from
the thresholds, and writes that transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dash_kernels.limits import MAX_SLAB_BYTES
from dash_kernels.spec import AttentionSpec, Queries
from dash_kernels.triton.key_rows import KeyRows, starts_of
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.tiles import (
    TileShape,
    list_arguments,
    listed_hits,
    load_rows,
    load_slot,
    resident_programs,
    routing_factor,
    routing_scores,
    tile_rows,
)


def chunk_lists(programs: int, n: int, device: torch.device) -> torch.Tensor:
    """Scratch for `list_chunks`: chunk ids and starts for each program."""
    return torch.empty(programs, 2, n, dtype=torch.int32, device=device)


def work_counter(device: torch.device) -> torch.Tensor:
    """The number of the next tile, from which the programs of a persistent kernel help themselves."""
    return torch.zeros(1, dtype=torch.int32, device=device)


@triton.jit
def list_chunks(
    mask_ptr, words, starts_ptr, ids_ptr, list_starts_ptr, first, chunk, HELD: tl.constexpr, TILES: tl.constexpr
):
    """Writes ids and starts of the chunks that TILES neighbouring tiles selected and that the part holds (starts_ptr:
    -1 where not), or of those that it lacks, ascending; returns their number.

    mask_ptr: the first tile's row of words.
    """
    WORDS: tl.constexpr = 32
    count = 0
    end = (chunk + 31) // 32
    for at in range(first // 32, end, WORDS):
        word_at = at + tl.arange(0, WORDS)
        word = tl.load(mask_ptr + word_at, mask=word_at < end, other=0)
        for tile in tl.static_range(1, TILES):
            word |= tl.load(mask_ptr + tile * words + word_at, mask=word_at < end, other=0)
        bits = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, [WORDS * 32])
        ids = at * 32 + tl.arange(0, WORDS * 32)
        on = (bits > 0) & (ids >= first) & (ids < chunk)
        starts = tl.load(starts_ptr + ids, mask=on, other=-1)
        keep = (on & ((starts >= 0) == HELD)).to(tl.int32)
        place = count + tl.cumsum(keep, axis=0) - keep
        tl.store(ids_ptr + place, ids, mask=keep > 0)
        tl.store(list_starts_ptr + place, starts, mask=keep > 0)
        count += tl.sum(keep, axis=0)
    tl.debug_barrier()  # other threads read what this one wrote
    return count


# Of a piece: small ones split a hot chunk, large ones cost less per piece, of which small groups have more.
LEAST_PIECE_TOKENS, LEAST_PIECE_ROWS = 8192, 65_536


@dataclass(frozen=True)
class QuerySlab:
    """Which tokens of consecutive slots of the queries selected which chunk.

    pieces: what one program gathers from at a time; the last may have fewer slots.
    words:  int32 [B, Hkv, n, pieces x words of a piece], a bit per place (slot - first) x C + place in the chunk; not
            written where a part lacks the chunk.
    """

    pieces: int
    words: torch.Tensor


def slab_slots(slots: int, tile: TileShape, batch_heads: int, n: int) -> tuple[int, int]:
    """(slots of a slab, slots of a piece), multiples of 8: then a row of bits is whole words for any chunk size.

    The bits of a slab stay within MAX_SLAB_BYTES, or what 8 slots take: a slab has fewer slots where there are more
    chunks.
    """
    longest = MAX_SLAB_BYTES * 8 // (batch_heads * n * tile.chunk_size)
    tokens = max(LEAST_PIECE_TOKENS, LEAST_PIECE_ROWS // tile.padded_group)
    piece = min(tokens // tile.chunk_size, longest, slots + 7) // 8 * 8
    piece = max(piece, 8)
    return max(min(longest, slots + piece - 1) // piece, 1) * piece, piece


def query_bits(
    queries: Queries,
    split: tuple[torch.Tensor, torch.Tensor],
    keys: KeyRows,
    begin: int,
    end: int,
    piece: int,
    spec: AttentionSpec,
) -> QuerySlab:
    """The slab of the slots begin to end, with bits where the part has the chunk."""
    q, chunks, routing = queries.q, queries.chunks, queries.routing
    batch, n, kv_heads, _ = queries.summaries.shape
    tile = TileShape.of(q, kv_heads, spec)
    options = launch_options("route", q)
    tokens = 8  # of a program: a byte
    while tokens * 2 * tile.padded_group <= options.rows and spec.chunk_size % (tokens * 2) == 0:
        tokens *= 2
    pieces = -(-(end - begin) // piece)
    places = pieces * piece * spec.chunk_size
    bits = torch.zeros(batch, kv_heads, n, places // 8, dtype=torch.int8, device=q.device)
    work = (end - begin) * (spec.chunk_size // tokens) * batch * kv_heads
    programs = min(resident_programs(q.device, options.resident), work)
    constants = tile.constants | {"BT": tokens}
    query_bits_kernel[(programs,)](
        q.contiguous(), chunks.on(q.device), *split, routing.tau, routing.masks, keys.starts,
        chunk_lists(programs, n, q.device), work_counter(q.device), bits, *list_arguments(routing), q.shape[1], n,
        len(chunks), begin, end - begin, batch * kv_heads, places // 8, routing_factor(spec),
        BN=options.block, TILES=tokens // tile.tokens, BLOCKS=keys.blocks, LISTED=routing.lists is not None,
        **constants, **options.launch,
    )  # fmt: skip
    return QuerySlab(pieces, bits.view(torch.int32))


@triton.jit(do_not_specialize=["width", "T", "n", "slots", "begin", "slab", "batch_heads", "row_bytes"])
def query_bits_kernel(
    q_ptr, grid_ptr, high_ptr, low_ptr, tau_ptr, mask_ptr, starts_ptr, list_ptr, next_ptr, bits_ptr, lists_ptr, width,
    T, n, slots, begin, slab, batch_heads, row_bytes, factor,
    HQ: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = C // BT
    BYTES: tl.constexpr = BT // 8
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
                bits = hit << (tl.arange(0, BT) % 8)[:, None]
                by_byte = tl.sum(tl.reshape(bits, [BYTES, 8, BN]), axis=1)
                row = (batch_head.to(tl.int64) * n + ids) * row_bytes
                byte = step * BYTES + tl.arange(0, BYTES)
                tl.store(bits_ptr + row[None, :] + byte[:, None], by_byte.to(tl.int8), mask=inside[None, :])
                # A step ahead: loads whose addresses come from a load of the same step are not fetched in advance.
                ids = tl.load(ids_ptr + at + BN + column, mask=at + BN + column < count, other=0)
            tl.debug_barrier()  # the list is written anew
        work = tl.atomic_add(next_ptr, 1)


@triton.jit
def list_queries(words_ptr, grid_ptr, tokens_ptr, slots, begin, words, C: tl.constexpr):
    """Writes the tokens of a slab that selected a chunk, ascending; returns their number.

    words_ptr: the chunk's row of bits.
    """
    WORDS: tl.constexpr = 32
    count = 0
    for at in range(0, words, WORDS):
        word_at = at + tl.arange(0, WORDS)
        word = tl.load(words_ptr + word_at, mask=word_at < words, other=0)
        if tl.max((word != 0).to(tl.int32), axis=0) > 0:
            bits = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, [WORDS * 32])
            place = at * 32 + tl.arange(0, WORDS * 32)
            token = tl.load(grid_ptr + slots + begin + place // C, mask=bits > 0, other=0) + place % C
            at_list = count + tl.cumsum(bits, axis=0) - bits
            tl.store(tokens_ptr + at_list, token, mask=bits > 0)
            count += tl.sum(bits, axis=0)
    tl.debug_barrier()  # other threads read what this one wrote
    return count

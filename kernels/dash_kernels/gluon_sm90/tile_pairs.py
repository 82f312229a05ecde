"""Two neighbouring tiles of a chunk on one stream of K and V: what the warp-specialised kernels for Hopper share.

A tile of 64 rows keeps a multiprocessor busy with a chunk for less time than L2 needs to deliver it, so kernels of one
tile run at L2's bandwidth. Neighbouring tiles select mostly the same chunks: here a program works on a pair, and
each chunk that either selected is fetched once. The warps of a program are partitioned (in Gluon, which Triton's
interpreter does not run; the kernels of one tile compute the same):

    a tile partition for each tile, one warp group: waits for a chunk, and computes it or passes it over
    the lister, one warp:                           takes the next pair and lists what it selected, one pair ahead
    the loader, one warp:                           brings K and V of the listed chunks into a ring in shared memory

Both tile partitions meet every chunk of the ring, also those they pass over: a slot is free when both have let go of
it. Partitions must take the same arguments, which come in bundles; each partition names the parts. Chunks are complete,
groups and head dims powers of two (`launch.pair_options`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dash_kernels.triton.key_rows import KeyRows
from dash_kernels.triton.tiles import TileShape

# Of the threads of a partition; named thread_barrier before Triton 3.7.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

NUM_WARPS = 4  # of the first tile partition
PARTITION_WARPS = gl.constexpr((4, 1, 1))  # of the second one, the lister and the loader
LIST_HEADER = gl.constexpr(8)  # integers before a list: its length, the piece of work, and what else a kernel needs
ID_BITS = gl.constexpr((1 << 29) - 1)  # of an entry of a list: the chunk's id
SELECTED_BIT = gl.constexpr(29)  # of an entry: the first tile selected the chunk; the next bit: the second one did


@dataclass(frozen=True)
class RingShape:
    """Compile-time shape of a kernel with specialised warps.

    ring: how much is in flight, chunks or tiles; has_sigma: the prior is centred; blocks: K and V come in single
    blocks.
    """

    tile: TileShape
    ring: int
    has_sigma: bool
    blocks: bool

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.tile.tokens * self.tile.group

    def product(self, columns: int) -> gl.NVMMADistributedLayout:
        """Layout of the product [rows, columns] of one warp group."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@dataclass(frozen=True)
class PairShape(RingShape):
    """Compile-time shape of a kernel on pairs of tiles.

    ring:          chunks of K and V in flight.
    block:         chunks whose biases are computed at a time.
    is_first_part, is_last_part: position of this part in the sequence of parts. The last part that is not also the
                   first lists the selected chunks of earlier parts as well.
    """

    block: int
    is_first_part: bool
    is_last_part: bool

    def factor(self, columns: int) -> gl.DotOperandLayout:
        """Layout of the first factor, in registers, of such a product."""
        return gl.DotOperandLayout(0, self.product(columns), 2)


def pair_maps(keys: KeyRows, tile: TileShape) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Tensor maps of K and of V, a chunk of one head at a time."""
    width = tile.head_dim if keys.blocks else tile.kv_heads * tile.head_dim
    block = [tile.chunk_size, tile.head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    k_map, v_map = (TensorDescriptor.from_tensor(x.view(-1, width), block, layout) for x in (keys.k, keys.v))
    return k_map, v_map


def two_lists(programs: int, entries: int, device: torch.device) -> torch.Tensor:
    """Scratch for two lists of each program: one in use, one being written."""
    return torch.empty(programs, 2, LIST_HEADER.value + entries, dtype=torch.int32, device=device)


@gluon.jit
def ring_barriers(RING: gl.constexpr):
    """(a slot is filled, a slot is free) [RING] and (a list is written, a list is done with) [2]."""
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    listed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(RING):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)  # both tile partitions
    for turn in gl.static_range(2):
        mbarrier.init(listed.index(turn), count=1)
        mbarrier.init(done.index(turn), count=3)  # they and the loader
    fence_async_shared()
    return ready, free, listed, done


@gluon.jit
def pairs_of(slots, batch_heads, shape: gl.constexpr):
    """Number of pairs of tiles."""
    return slots * (shape.tile.per_chunk // 2) * batch_heads


@gluon.jit
def place_of(work, slots, shape: gl.constexpr):
    """(KV head of the batch, first tile of the pair, slot): late chunks have the longest lists and go first."""
    pairs = slots * (shape.tile.per_chunk // 2)
    tile = (pairs - 1 - work % pairs) * 2
    return work // pairs, tile, tile // shape.tile.per_chunk


@gluon.jit
def list_of(list_ptr, turn, entries):
    """The list of this program's turn-th piece of work in the scratch of `two_lists`: its header, then the entries."""
    number = gl.program_id(0) * 2 + (turn & 1)
    return list_ptr + number.to(gl.int64) * (LIST_HEADER + entries)


@gluon.jit
def wait_listed(list_ptr, listed, turn, entries):
    """The turn-th piece of work, once its list is there: -1 after the last one."""
    mbarrier.wait(listed.index(turn & 1), (turn >> 1) & 1)
    return gl.load(list_of(list_ptr, turn, entries) + 1)


@gluon.jit
def end_lists(list_ptr, listed, done, turn, entries):
    """There is no turn-th piece of work."""
    mbarrier.wait(done.index(turn & 1), ((turn >> 1) & 1) ^ 1)
    gl.store(list_of(list_ptr, turn, entries) + 1, -1)
    barrier()
    mbarrier.arrive(listed.index(turn & 1), count=1)


@gluon.jit
def starts_of_head(starts_ptr, batch_head, n, shape: gl.constexpr):
    """The row of `KeyRows.starts` of a KV head."""
    row = starts_ptr
    if shape.blocks:
        row = starts_ptr + batch_head.to(gl.int64) * n
    return row


@gluon.jit
def lister(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr):
    """Partition: the list of each pair, ascending, of the chunks that the part holds: ids with the bits of the tiles
    (from the end, those of chunks that the part lacks), then starts at a distance of n. Its header: number of chunks,
    pair, number of chunks that the part lacks.
    """
    WORDS: gl.constexpr = 8
    by_word: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    grid_ptr, starts_ptr, mask_ptr, list_ptr, next_ptr, _k_map, _v_map = keys
    _ready, _free, listed, done = barriers
    _T, _S, n, slots, batch_heads = sizes
    words = (n + 31) // 32
    turn = 0
    work = gl.atomic_add(next_ptr, 1)  # handed out one by one: lists differ in length
    while work < pairs_of(slots, batch_heads, shape):
        batch_head, tile, slot = place_of(work, slots, shape)
        chunk = gl.load(grid_ptr + slot)
        first = gl.load(grid_ptr + 3 * slots + slot)
        starts_row = starts_of_head(starts_ptr, batch_head, n, shape)
        mask_row = mask_ptr + (batch_head.to(gl.int64) * (slots * shape.tile.per_chunk) + tile) * words
        list_at = list_of(list_ptr, turn, 2 * n)
        mbarrier.wait(done.index(turn & 1), ((turn >> 1) & 1) ^ 1)
        count = 0
        lacking = 0
        end = (chunk + 31) // 32
        for at in range(first // 32, end, WORDS):
            word_at = at + gl.arange(0, WORDS, gl.SliceLayout(1, by_word))
            bit = gl.arange(0, 32, gl.SliceLayout(0, by_word))
            words_1 = gl.load(mask_row + word_at, mask=word_at < end, other=0)
            words_2 = gl.load(mask_row + words + word_at, mask=word_at < end, other=0)
            bits_1 = (gl.expand_dims(words_1, 1) >> gl.expand_dims(bit, 0)) & 1
            bits_2 = (gl.expand_dims(words_2, 1) >> gl.expand_dims(bit, 0)) & 1
            selected = gl.convert_layout(gl.reshape(bits_1 | (bits_2 << 1), [WORDS * 32]), flat)
            ids = at * 32 + gl.arange(0, WORDS * 32, flat)
            on = (selected > 0) & (ids >= first) & (ids < chunk)
            starts = gl.load(starts_row + ids, mask=on, other=-1)
            keep = (on & (starts >= 0)).to(gl.int32)
            place = LIST_HEADER + count + gl.associative_scan(keep, 0, add) - keep
            gl.store(list_at + place, ids | (selected << SELECTED_BIT), mask=keep > 0)
            gl.store(list_at + n + place, starts, mask=keep > 0)
            count += gl.sum(keep, 0)
            if shape.is_last_part and not shape.is_first_part:
                lacks = on.to(gl.int32) - keep
                place = lacking + gl.associative_scan(lacks, 0, add) - lacks
                gl.store(list_at + LIST_HEADER + n - 1 - place, ids | (selected << SELECTED_BIT), mask=lacks > 0)
                lacking += gl.sum(lacks, 0)
        gl.store(list_at, count)
        gl.store(list_at + 1, work)
        gl.store(list_at + 2, lacking)
        barrier()  # all lanes have written
        mbarrier.arrive(listed.index(turn & 1), count=1)
        turn += 1
        work = gl.atomic_add(next_ptr, 1)
    end_lists(list_ptr, listed, done, turn, 2 * n)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def loader(keys, rows, buffers, barriers, sizes, factors, shape: gl.constexpr):
    """Partition: K and V of each pair's own chunk, where the part holds it, and of the chunks in its list."""
    grid_ptr, starts_ptr, _mask_ptr, list_ptr, _next_ptr, k_map, v_map = keys
    chunk_rings, _tile_buffers = buffers
    k_ring, v_ring = chunk_rings
    _ready, _free, listed, done = barriers
    _T, S, n, slots, _batch_heads = sizes
    turn = 0
    met = 0
    work = wait_listed(list_ptr, listed, turn, 2 * n)
    while work >= 0:
        batch_head, _tile, slot = place_of(work, slots, shape)
        row = 0
        column = 0
        if not shape.blocks:
            row = (batch_head // shape.tile.kv_heads) * S
            column = (batch_head % shape.tile.kv_heads) * shape.tile.head_dim
        own = gl.load(starts_of_head(starts_ptr, batch_head, n, shape) + gl.load(grid_ptr + slot))
        if own >= 0:
            fetch(k_map, v_map, row + own, column, k_ring, v_ring, barriers, met, shape)
            met += 1
        list_at = list_of(list_ptr, turn, 2 * n)
        count = gl.load(list_at)
        for index in range(count):
            start = gl.load(list_at + LIST_HEADER + n + index)
            fetch(k_map, v_map, row + start, column, k_ring, v_ring, barriers, met, shape)
            met += 1
        mbarrier.arrive(done.index(turn & 1), count=1)
        turn += 1
        work = wait_listed(list_ptr, listed, turn, 2 * n)


@gluon.jit
def fetch(k_map, v_map, row, column, k_ring, v_ring, barriers, met, shape: gl.constexpr):
    """K and V of a chunk, the met-th of the ring."""
    ready, free, _listed, _done = barriers
    slot = met % shape.ring
    filled = ready.index(slot)
    mbarrier.wait(free.index(slot), ((met // shape.ring) & 1) ^ 1)
    mbarrier.expect(filled, k_map.block_type.nbytes + v_map.block_type.nbytes)
    tma.async_copy_global_to_shared(k_map, [row, column], filled, k_ring.index(slot))
    tma.async_copy_global_to_shared(v_map, [row, column], filled, v_ring.index(slot))


@gluon.jit
def wait_filled(barriers, met, shape: gl.constexpr):
    """The slot of the met-th chunk of the ring, once it is there."""
    slot = met % shape.ring
    ready, _free, _listed, _done = barriers
    mbarrier.wait(ready.index(slot), (met // shape.ring) & 1)
    return slot


@gluon.jit
def row_offsets(start, step, batch_head, T, layout: gl.constexpr, shape: gl.constexpr):
    """(place in the chunk, index into [B, T, HQ]) of the rows of a chunk's step-th tile, for vectors of `layout`."""
    tile: gl.constexpr = shape.tile
    M: gl.constexpr = shape.rows
    row = gl.arange(0, M, layout)
    place = step * tile.tokens + row // tile.group
    token = (batch_head // tile.kv_heads).to(gl.int64) * T + start + place
    return place, token * tile.query_heads + (batch_head % tile.kv_heads) * tile.group + row % tile.group


@gluon.jit
def tile_pointers(pointer, start, step, batch_head, T, layout: gl.constexpr, shape: gl.constexpr):
    """To a tile's rows of a [B, T, HQ, D] tensor, [M, D] of `layout`."""
    _place, rows = row_offsets(start, step, batch_head, T, gl.SliceLayout(1, layout), shape)
    D: gl.constexpr = shape.tile.head_dim
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    return pointer + gl.expand_dims(rows * D, 1) + gl.expand_dims(column, 0)


@gluon.jit
def load_entries(list_at, block, count, shape: gl.constexpr):
    """A block of a list, zeros beyond its end.  [BN]"""
    listed = block + entry_numbers(shape)
    return gl.load(list_at + LIST_HEADER + listed, mask=listed < count, other=0)


@gluon.jit
def load_lacking(list_at, block, count, n, shape: gl.constexpr):
    """A block of the chunks that the part lacks, zeros beyond their end.  [BN]"""
    listed = block + entry_numbers(shape)
    return gl.load(list_at + LIST_HEADER + n - 1 - listed, mask=listed < count, other=0)


@gluon.jit
def entry_numbers(shape: gl.constexpr):
    BN: gl.constexpr = shape.block
    by_summary: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    return gl.arange(0, BN, gl.SliceLayout(1, by_summary))


@gluon.jit
def selected_word(entries, shape: gl.constexpr, WHICH: gl.constexpr):
    """A bit for each of the entries, of which there are at most 64: the tile selected the chunk."""
    selected = ((entries >> (SELECTED_BIT + WHICH)) & 1).to(gl.int64)
    return gl.sum(selected << entry_numbers(shape).to(gl.int64), 0)

"""The rows of the queries that selected a chunk, in a ring in shared memory: two partitions of a specialised kernel.

    the lister, one warp:     takes the next piece of work, and lists the queries that selected its chunk
    the gatherer, two warps:  copies K and V of the chunk, then the rows of the listed queries, a tile of 64 at a time

A tile here is any tokens of the list that follow each other, not neighbours in the sequence. A barrier in shared
memory is waited for by its number of uses so far: use i completes phase i & 1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from dash_kernels.gluon_sm90.tile_pairs import LIST_HEADER, add, barrier, end_lists, list_of, wait_listed

GATHERER_WARPS = gl.constexpr(2)
LISTER_WARPS = gl.constexpr(1)
GATHER_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0]))
VECTORS = gl.constexpr(5)  # of a row: tau, log-sum-exp, delta, ratio and the mean of log P


@gluon.jit
def barrier_pair(NUMBER: gl.constexpr, READY: gl.constexpr, FREE: gl.constexpr):
    """(something is there, it is done with) [NUMBER] each; READY and FREE partitions say so."""
    ready = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(NUMBER):
        mbarrier.init(ready.index(index), count=READY)
        mbarrier.init(free.index(index), count=FREE)
    return ready, free


@gluon.jit
def lister(tables, rows, keys, buffers, barriers, sizes, factors, shape: gl.constexpr):
    """Partition: a list for each piece of work. Its header: number of queries, piece of work (-1 after the last one),
    KV head of the batch, chunk, where its keys start, where its own queries start (-1 where they are not in the piece).
    """
    C: gl.constexpr = shape.tile.chunk_size
    WORDS: gl.constexpr = 32  # at a time
    by_word: gl.constexpr = gl.BlockedLayout([1, 32], [32, 1], [1, 1], [1, 0])
    by_lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    PER_CHUNK: gl.constexpr = C // 32
    grid_ptr, query_slots_ptr, key_table_ptr, words_ptr, list_ptr, turns_ptr = tables
    _T, _S, n, slots, slab_begin, slab_end, piece_slots, pieces, met, key_slots, key_rows = sizes
    of_ring, _of_scores, _of_chunk = barriers
    _ready, _free, listed, done, _keys_ready, _keys_free = of_ring
    piece_words = piece_slots * C // 32
    chunks = met * key_rows
    turn = 0
    # Handed out in order, so a program that waits for its turn to add waits for a running one.
    work = gl.atomic_add(turns_ptr, 1)
    while work < pieces * chunks:
        piece = work // chunks
        key_slot = work % met
        begin = slab_begin + piece * piece_slots
        end = gl.minimum(begin + piece_slots, slab_end)
        if shape.blocks:
            address = gl.load(key_table_ptr + key_slot)
            batch_head = (address // n).to(gl.int32)
            chunk = (address % n).to(gl.int32)
            key_start = key_slot * 2 * C
        else:
            batch_head = work % chunks // met
            chunk = gl.load(key_table_ptr + key_slot)
            key_start = gl.load(key_table_ptr + key_slots + key_slot)
        own = gl.load(query_slots_ptr + chunk)
        own_start = -1
        if (own >= begin) & (own < end):
            own_start = gl.load(grid_ptr + slots + own)
        bits_row = words_ptr + ((batch_head.to(gl.int64) * n + chunk) * pieces + piece) * piece_words
        list_at = list_of(list_ptr, turn, piece_slots * C)
        mbarrier.wait(done.index(turn & 1), ((turn >> 1) & 1) ^ 1)
        count = 0
        index = gl.arange(0, WORDS, gl.SliceLayout(1, by_word))
        bit = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, by_word)), 0)
        starts_ptr = grid_ptr + slots + begin
        word = gl.load(bits_row + index, mask=index < piece_words, other=0)
        start = gl.load(starts_ptr + index // PER_CHUNK, mask=word != 0, other=0)
        for at in range(WORDS, piece_words + WORDS, WORDS):
            bits = (gl.expand_dims(word, 1) >> bit) & 1
            first = gl.expand_dims(start + index % PER_CHUNK * 32, 1)
            # A step ahead: both come from memory, one after the other.
            word = gl.load(bits_row + at + index, mask=at + index < piece_words, other=0)
            in_word = gl.sum(bits, 1)
            until = gl.associative_scan(gl.convert_layout(in_word, by_lane), 0, add)
            before = gl.convert_layout(until, gl.SliceLayout(1, by_word)) - in_word
            place = count + gl.expand_dims(before, 1) + gl.associative_scan(bits, 1, add) - bits
            gl.store(list_at + LIST_HEADER + place, first + bit, mask=bits > 0)
            count += gl.sum(in_word, 0)
            start = gl.load(starts_ptr + (at + index) // PER_CHUNK, mask=word != 0, other=0)
        gl.store(list_at, count)
        gl.store(list_at + 1, work)
        gl.store(list_at + 2, batch_head)
        gl.store(list_at + 3, chunk)
        gl.store(list_at + 4, key_start)
        gl.store(list_at + 5, own_start)
        barrier()  # all lanes have written
        mbarrier.arrive(listed.index(turn & 1), count=1)
        turn += 1
        work = gl.atomic_add(turns_ptr, 1)
    end_lists(list_ptr, listed, done, turn, piece_slots * C)


@gluon.jit
def tiles_of(list_at, shape: gl.constexpr):
    """(number of listed queries, tiles of the chunk's own queries, tiles of the listed ones)."""
    BT: gl.constexpr = shape.tile.tokens
    count = gl.load(list_at)
    own_tiles = gl.where(gl.load(list_at + 5) >= 0, shape.tile.chunk_size // BT, 0)
    return count, own_tiles, (count + BT - 1) // BT


@gluon.jit
def gatherer(tables, rows, keys, buffers, barriers, sizes, factors, shape: gl.constexpr):
    """Partition: K and V of each chunk, and the rows of its queries."""
    C: gl.constexpr = shape.tile.chunk_size
    BT: gl.constexpr = shape.tile.tokens
    _grid_ptr, _query_slots_ptr, _key_table_ptr, _words_ptr, list_ptr, _turns_ptr = tables
    k_map, v_map, _query_ptr, _dk_ptr, _dv_ptr, _share_ptr = keys
    chunk_keys, _tile_rings, _product_buffers, _summary_buffers = buffers
    k, v = chunk_keys
    T, S, _n, _slots, _slab_begin, _slab_end, piece_slots, _pieces, _met, _key_slots, _key_rows = sizes
    of_ring, _of_scores, _of_chunk = barriers
    _ready, _free, listed, done, keys_ready, keys_free = of_ring
    turn = 0
    used = 0
    met = 0
    work = wait_listed(list_ptr, listed, turn, piece_slots * C)
    while work >= 0:
        list_at = list_of(list_ptr, turn, piece_slots * C)
        count, own_tiles, tiles = tiles_of(list_at, shape)
        batch_head = gl.load(list_at + 2)
        if own_tiles + tiles > 0:
            row = gl.load(list_at + 4)
            column = 0
            if not shape.blocks:
                row += (batch_head // shape.tile.kv_heads) * S
                column = (batch_head % shape.tile.kv_heads) * shape.tile.head_dim
            mbarrier.wait(keys_free.index(0), (used & 1) ^ 1)
            mbarrier.expect(keys_ready.index(0), k_map.block_type.nbytes + v_map.block_type.nbytes)
            tma.async_copy_global_to_shared(k_map, [row, column], keys_ready.index(0), k)
            tma.async_copy_global_to_shared(v_map, [row, column], keys_ready.index(0), v)
            used += 1
            own_start = gl.load(list_at + 5)
            for tile in range(own_tiles):
                fetch_tile(rows, buffers, barriers, own_start, tile * BT, C, batch_head, T, met, True, shape)
                met += 1
            for tile in range(tiles):
                tokens_ptr = list_at + LIST_HEADER
                fetch_tile(rows, buffers, barriers, tokens_ptr, tile * BT, count, batch_head, T, met, False, shape)
                met += 1
        mbarrier.arrive(done.index(turn & 1), count=1)
        turn += 1
        work = wait_listed(list_ptr, listed, turn, piece_slots * C)


@gluon.jit
def fetch_tile(
    rows, buffers, barriers, tokens, first, count, batch_head, T, met, OWN: gl.constexpr, shape: gl.constexpr
):
    """Starts the copies of the met-th tile: q, the gradient of the output, and what else there is of a row.

    tokens: the list, or the first of a chunk's OWN tokens; the tile begins at the first-th. Rows beyond the end repeat
    the last token, and will be given no weight.
    """
    M: gl.constexpr = shape.rows
    HK: gl.constexpr = shape.tile.kv_heads
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    grad_ptr, q_ptr, tau_ptr, lse_ptr, delta_ptr, ratio_ptr, log_mean_ptr = rows
    _chunk_keys, tile_rings, _product_buffers, _summary_buffers = buffers
    q_ring, grad_ring, vectors = tile_rings
    of_ring, _of_scores, _of_chunk = barriers
    ready, free, _listed, _done, _keys_ready, _keys_free = of_ring
    row = gl.arange(0, M // 2, gl.SliceLayout(1, GATHER_LAYOUT))
    # All tokens first, so that the wait hides that they come from memory.
    token_1 = token_of(tokens, first, row, count, OWN, shape)
    token_2 = token_of(tokens, first, row + M // 2, count, OWN, shape)
    each = token_of(tokens, first, gl.arange(0, M, one_each), count, OWN, shape)
    slot = met % shape.ring
    mbarrier.wait(free.index(slot), ((met // shape.ring) & 1) ^ 1)
    fetch_half(q_ptr, grad_ptr, q_ring, grad_ring, token_1, batch_head, T, slot, 0, shape)
    fetch_half(q_ptr, grad_ptr, q_ring, grad_ring, token_2, batch_head, T, slot, 1, shape)
    row_at = row_index(each, gl.arange(0, M, one_each), batch_head, T, shape)
    async_copy.async_copy_global_to_shared(vectors.index(slot * VECTORS), tau_ptr + row_at)
    async_copy.async_copy_global_to_shared(vectors.index(slot * VECTORS + 1), lse_ptr + row_at)
    async_copy.async_copy_global_to_shared(vectors.index(slot * VECTORS + 2), delta_ptr + row_at)
    async_copy.async_copy_global_to_shared(vectors.index(slot * VECTORS + 3), ratio_ptr + row_at)
    if shape.has_sigma:
        of_token = ((batch_head // HK).to(gl.int64) * T + each) * HK + batch_head % HK
        async_copy.async_copy_global_to_shared(vectors.index(slot * VECTORS + 4), log_mean_ptr + of_token)
    async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)


@gluon.jit
def token_of(tokens, first, row, count, OWN: gl.constexpr, shape: gl.constexpr):
    """The token of a row of a tile."""
    place = gl.minimum(first + row // shape.tile.group, count - 1)
    return tokens + place if OWN else gl.load(tokens + place)


@gluon.jit
def fetch_half(q_ptr, grad_ptr, q_ring, grad_ring, token, batch_head, T, slot, HALF: gl.constexpr, shape: gl.constexpr):
    """Starts the copies of q and the gradient of the output for half of a tile's rows, 64 columns at a time."""
    D: gl.constexpr = shape.tile.head_dim
    M: gl.constexpr = shape.rows
    PANELS: gl.constexpr = D // 64
    of_panel: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M // 2, 64], q_ring.dtype)
    # A tile lies in shared memory as panels of 64 columns, of which half the rows are in one piece.
    panels: gl.constexpr = [shape.ring * PANELS * 2, M // 2, 64]
    q_panels = q_ring._reinterpret(q_ring.dtype, panels, of_panel)
    grad_panels = grad_ring._reinterpret(grad_ring.dtype, panels, of_panel)
    row = row_index(token, gl.arange(0, M // 2, gl.SliceLayout(1, GATHER_LAYOUT)), batch_head, T, shape)
    column = gl.arange(0, 64, gl.SliceLayout(0, GATHER_LAYOUT))
    offsets = gl.expand_dims(row * D, 1) + gl.expand_dims(column, 0)
    for panel in gl.static_range(PANELS):
        at = (slot * PANELS + panel) * 2 + HALF
        async_copy.async_copy_global_to_shared(q_panels.index(at), q_ptr + panel * 64 + offsets)
        async_copy.async_copy_global_to_shared(grad_panels.index(at), grad_ptr + panel * 64 + offsets)


@gluon.jit
def row_index(token, row, batch_head, T, shape: gl.constexpr):
    """Index into [B, T, HQ] of rows."""
    tile: gl.constexpr = shape.tile
    of_token = (batch_head // tile.kv_heads).to(gl.int64) * T + token
    return of_token * tile.query_heads + (batch_head % tile.kv_heads) * tile.group + row % tile.group

"""Gradients of keys and values for Hopper: `triton.key_gradient` by specialised warps.

One warp group that does everything has no registers left after both gradients of a chunk, and its products wait for
its arithmetic. In addition to the lister and the gatherer (`gather.py`), this kernel has

    two score partitions, a warp group each:  the weights and the gradients of the scores, for every other tile
    the adder, a warp group:                  holds dK and dV, and adds the products of all tiles
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dash_kernels.gluon_sm90.gather import (
    GATHERER_WARPS,
    LISTER_WARPS,
    VECTORS,
    barrier_pair,
    gatherer,
    lister,
    tiles_of,
)
from dash_kernels.gluon_sm90.launch import GatherOptions
from dash_kernels.gluon_sm90.tile_pairs import RingShape, barrier, list_of, pair_maps, two_lists, wait_listed
from dash_kernels.triton.key_rows import KeyRows
from dash_kernels.triton.tiles import LEAST_PRIOR, LN_2, LOG2_E, TileShape

NUM_WARPS = 4  # of the first score partition
PARTITION_WARPS = gl.constexpr((4, 4, GATHERER_WARPS.value, LISTER_WARPS.value))  # the second one, the adder, helpers
KEY_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of a chunk that a warp group reads


def launch_gathered(
    programs: int,
    of_queries: tuple[torch.Tensor, ...],
    keys: KeyRows,
    of_work: tuple[torch.Tensor, ...],
    results: tuple[torch.Tensor, ...],
    sizes: tuple[int, ...],
    factors: tuple[float, ...],
    piece_tokens: int,
    tile: TileShape,
    options: GatherOptions,
    *,
    has_sigma: bool,
) -> None:
    """Adds to `results` as `triton.key_gradient.key_gradient_kernel` does, whose arguments these are."""
    shape = RingShape(tile, options.ring, has_sigma, keys.blocks)
    lists = two_lists(programs, piece_tokens, of_queries[0].device)
    key_gradient_gathered_kernel[(programs,)](
        *of_queries, *pair_maps(keys, tile), *of_work, lists, *results, *sizes, *factors, SHAPE=shape,
        SCORE_REGISTERS=options.score_registers, ADDER_REGISTERS=options.adder_registers,
        HELPER_REGISTERS=options.helper_registers, num_warps=NUM_WARPS, maxnreg=options.max_registers,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "T", "S", "n", "slots", "slab_begin", "slab_end", "piece_slots", "pieces", "met", "key_slots", "key_rows"
    ]
)  # fmt: skip
def key_gradient_gathered_kernel(
    grad_ptr, q_ptr, grid_ptr, query_slots_ptr, k_map, v_map, key_table_ptr, query_ptr, tau_ptr, log_mean_ptr,
    lse_ptr, delta_ptr, ratio_ptr, words_ptr, list_ptr, turns_ptr, dk_ptr, dv_ptr, share_ptr,
    T, S, n, slots, slab_begin, slab_end, piece_slots, pieces, met, key_slots, key_rows,
    factor, scale2, prior_exponent, scale, logit_scale, prior_floor,
    SHAPE: gl.constexpr, SCORE_REGISTERS: gl.constexpr, ADDER_REGISTERS: gl.constexpr, HELPER_REGISTERS: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = SHAPE.tile.chunk_size
    D: gl.constexpr = SHAPE.tile.head_dim
    M: gl.constexpr = SHAPE.rows
    RING: gl.constexpr = SHAPE.ring
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], k_map.dtype)
    of_weights: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, C], k_map.dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k = gl.allocate_shared_memory(k_map.dtype, [C, D], k_map.layout)
    v = gl.allocate_shared_memory(k_map.dtype, [C, D], k_map.layout)
    q_ring = gl.allocate_shared_memory(k_map.dtype, [RING, M, D], of_rows)
    grad_ring = gl.allocate_shared_memory(k_map.dtype, [RING, M, D], of_rows)
    vectors = gl.allocate_shared_memory(gl.float32, [RING * VECTORS, M], flat)
    # Of each score partition.
    weights = gl.allocate_shared_memory(k_map.dtype, [2, M, C], of_weights)
    dscores = gl.allocate_shared_memory(k_map.dtype, [2, M, C], of_weights)
    # Of each score partition: the weights of the summary. From the first to the second: its sums for their gradient.
    # From that one to the adder: the gradient of the logits of the weights, and that of the query that weighs.
    of_summary = gl.allocate_shared_memory(gl.float32, [2, C], flat)
    along_keys = gl.allocate_shared_memory(gl.float32, [C], flat)
    dlogits = gl.allocate_shared_memory(gl.float32, [C], flat)
    dquery = gl.allocate_shared_memory(gl.float32, [D], flat)
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(RING):
        mbarrier.init(ready.index(slot), count=32 * GATHERER_WARPS)
        mbarrier.init(free.index(slot), count=1)  # the adder reads it last
    listed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for turn in gl.static_range(2):
        mbarrier.init(listed.index(turn), count=1)
        mbarrier.init(done.index(turn), count=4)
    keys_ready, keys_free = barrier_pair(1, 1, 2)
    weights_ready, weights_free = barrier_pair(2, 1, 1)
    dscores_ready, dscores_free = barrier_pair(2, 1, 1)
    along_ready, along_free = barrier_pair(1, 1, 1)
    dlogits_ready, dlogits_free = barrier_pair(1, 1, 1)
    fence_async_shared()
    tables = (grid_ptr, query_slots_ptr, key_table_ptr, words_ptr, list_ptr, turns_ptr)
    rows = (grad_ptr, q_ptr, tau_ptr, lse_ptr, delta_ptr, ratio_ptr, log_mean_ptr)
    keys = (k_map, v_map, query_ptr, dk_ptr, dv_ptr, share_ptr)
    buffers = (
        (k, v), (q_ring, grad_ring, vectors), (weights, dscores), (of_summary, along_keys, dlogits, dquery)
    )  # fmt: skip
    of_ring = (ready, free, listed, done, keys_ready, keys_free)
    of_scores = (weights_ready, weights_free, dscores_ready, dscores_free)
    of_chunk = (along_ready, along_free, dlogits_ready, dlogits_free)
    barriers = (of_ring, of_scores, of_chunk)
    sizes = (T, S, n, slots, slab_begin, slab_end, piece_slots, pieces, met, key_slots, key_rows)
    factors = (factor, scale2, prior_exponent, scale, logit_scale, prior_floor)
    gl.warp_specialize(
        [
            (first_scores, (tables, rows, keys, buffers, barriers, sizes, factors, SHAPE)),
            (second_scores, (tables, rows, keys, buffers, barriers, sizes, factors, SHAPE)),
            (adder, (tables, rows, keys, buffers, barriers, sizes, factors, SHAPE)),
            (gatherer, (tables, rows, keys, buffers, barriers, sizes, factors, SHAPE)),
            (lister, (tables, rows, keys, buffers, barriers, sizes, factors, SHAPE)),
        ],
        PARTITION_WARPS,
        [SCORE_REGISTERS, ADDER_REGISTERS, HELPER_REGISTERS, HELPER_REGISTERS],
    )


@gluon.jit
def adder(tables, rows, keys, buffers, barriers, sizes, factors, shape: gl.constexpr):
    """Partition: dK and dV of each chunk."""
    C: gl.constexpr = shape.tile.chunk_size
    D: gl.constexpr = shape.tile.head_dim
    of_sum: gl.constexpr = shape.product(D)
    by_key: gl.constexpr = gl.SliceLayout(1, of_sum)
    _grid_ptr, _query_slots_ptr, _key_table_ptr, _words_ptr, list_ptr, turns_ptr = tables
    _k_map, _v_map, query_ptr, dk_ptr, dv_ptr, share_ptr = keys
    _chunk_keys, tile_rings, product_buffers, summary_buffers = buffers
    q_ring, grad_ring, _vectors = tile_rings
    weights, dscores = product_buffers
    _of_summary, _along_keys, dlogits, dquery = summary_buffers
    _T, S, n, _slots, _slab_begin, _slab_end, piece_slots, _pieces, chunks_met, _key_slots, key_rows = sizes
    of_ring, of_scores, of_chunk = barriers
    _ready, free, listed, done, _keys_ready, _keys_free = of_ring
    weights_ready, weights_free, dscores_ready, dscores_free = of_scores
    _along_ready, _along_free, dlogits_ready, dlogits_free = of_chunk
    _factor, _scale2, _prior_exponent, scale, _logit_scale, _prior_floor = factors
    chunks = chunks_met * key_rows
    turn = 0
    used = 0
    met = 0
    work = wait_listed(list_ptr, listed, turn, piece_slots * C)
    while work >= 0:
        list_at = list_of(list_ptr, turn, piece_slots * C)
        _count, own_tiles, tiles = tiles_of(list_at, shape)
        batch_head = gl.load(list_at + 2)
        chunk = gl.load(list_at + 3)
        key_start = gl.load(list_at + 4)
        mbarrier.arrive(done.index(turn & 1), count=1)
        piece = work // chunks
        turn_ptr = turns_ptr + 1 + work % chunks
        if own_tiles + tiles > 0:
            dk = gl.zeros([C, D], gl.float32, of_sum)
            dv = gl.zeros([C, D], gl.float32, of_sum)
            for _tile in range(own_tiles + tiles):
                slot = met % shape.ring
                which = met & 1
                phase = (met >> 1) & 1
                mbarrier.wait(weights_ready.index(which), phase)
                dv = warpgroup_mma(weights.index(which).permute((1, 0)), grad_ring.index(slot), dv, is_async=True)
                mbarrier.wait(dscores_ready.index(which), phase)
                dk = warpgroup_mma(dscores.index(which).permute((1, 0)), q_ring.index(slot), dk, is_async=True)
                dv = warpgroup_mma_wait(1, deps=[dv])
                mbarrier.arrive(weights_free.index(which), count=1)
                dk = warpgroup_mma_wait(0, deps=[dk])
                mbarrier.arrive(dscores_free.index(which), count=1)
                mbarrier.arrive(free.index(slot), count=1)
                met += 1
            column = gl.arange(0, D, gl.SliceLayout(0, of_sum))
            head = batch_head % shape.tile.kv_heads
            batch = (batch_head // shape.tile.kv_heads).to(gl.int64)
            share = share_ptr + ((batch * n + chunk) * shape.tile.kv_heads + head) * D + column
            wait_for_turn(turn_ptr, piece)
            # Other multiprocessors wrote these: not from the first-level cache.
            pointers = key_pointers(dv_ptr, key_start, batch_head, S, of_sum, shape)
            gl.store(pointers, gl.load(pointers, cache_modifier=".cg") + dv)
            mbarrier.wait(dlogits_ready.index(0), used & 1)
            query = gl.load(query_ptr + head * D + column).to(gl.float32)
            dk = dk * scale + gl.expand_dims(dlogits.load(by_key), 1) * gl.expand_dims(query, 0)
            gl.store(share, gl.load(share, cache_modifier=".cg") + dquery.load(gl.SliceLayout(0, of_sum)))
            mbarrier.arrive(dlogits_free.index(0), count=1)
            pointers = key_pointers(dk_ptr, key_start, batch_head, S, of_sum, shape)
            gl.store(pointers, gl.load(pointers, cache_modifier=".cg") + dk)
            used += 1
        else:
            wait_for_turn(turn_ptr, piece)
        barrier()  # every thread's part is written before the next piece's turn
        gl.atomic_add(turn_ptr, 1)
        turn += 1
        work = wait_listed(list_ptr, listed, turn, piece_slots * C)


@gluon.jit
def first_scores(tables, rows, keys, buffers, barriers, sizes, factors, shape: gl.constexpr):
    walk_queries(tables, rows, keys, buffers, barriers, sizes, factors, shape, 0)


@gluon.jit
def second_scores(tables, rows, keys, buffers, barriers, sizes, factors, shape: gl.constexpr):
    walk_queries(tables, rows, keys, buffers, barriers, sizes, factors, shape, 1)


@gluon.jit
def walk_queries(tables, rows, keys, buffers, barriers, sizes, factors, shape: gl.constexpr, WHICH: gl.constexpr):
    """Partition: the weights and the gradients of the scores of even or of odd tiles."""
    C: gl.constexpr = shape.tile.chunk_size
    # Sums over the rows of a fragment, [warps, rows of a fragment, keys]: reduced further at the end only.
    of_along: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 8], [0, 0, 16], [0, 0, 32]],
        [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [2, 0, 0]],
        [],
        [4, 8, C],
    )
    by_key: gl.constexpr = gl.SliceLayout(0, shape.product(C))
    _grid_ptr, _query_slots_ptr, _key_table_ptr, _words_ptr, list_ptr, _turns_ptr = tables
    _k_map, _v_map, query_ptr, _dk_ptr, _dv_ptr, _share_ptr = keys
    chunk_keys, _tile_rings, _product_buffers, summary_buffers = buffers
    k_buffer, _v = chunk_keys
    of_summary, along_keys, dlogits_buffer, dquery_buffer = summary_buffers
    _T, _S, _n, _slots, _slab_begin, _slab_end, piece_slots, _pieces, _chunks_met, _key_slots, _key_rows = sizes
    of_ring, _of_scores, of_chunk = barriers
    _ready, _free, listed, done, keys_ready, keys_free = of_ring
    along_ready, along_free, dlogits_ready, dlogits_free = of_chunk
    _factor, _scale2, _prior_exponent, scale, logit_scale, _prior_floor = factors
    turn = 0
    used = 0
    met = 0
    work = wait_listed(list_ptr, listed, turn, piece_slots * C)
    while work >= 0:
        list_at = list_of(list_ptr, turn, piece_slots * C)
        count, own_tiles, tiles = tiles_of(list_at, shape)
        batch_head = gl.load(list_at + 2)
        mbarrier.arrive(done.index(turn & 1), count=1)
        if own_tiles + tiles > 0:
            mbarrier.wait(keys_ready.index(0), used & 1)
            write_summary_weights(k_buffer, of_summary, query_ptr, batch_head, scale, shape, WHICH)
            along = gl.zeros([4, 8, C], gl.float32, of_along)
            for tile in range((met ^ WHICH) & 1, own_tiles, 2):
                along = score_tile(buffers, barriers, factors, along, tile, C, met + tile, True, shape, WHICH)
            met += own_tiles
            for tile in range((met ^ WHICH) & 1, tiles, 2):
                along = score_tile(buffers, barriers, factors, along, tile, count, met + tile, False, shape, WHICH)
            met += tiles
            of_half = gl.convert_layout(gl.sum(gl.sum(along, 0), 0), by_key)
            if WHICH == 0:
                fence_async_shared()  # the next chunk comes through the other proxy
                mbarrier.arrive(keys_free.index(0), count=1)
                mbarrier.wait(along_free.index(0), (used & 1) ^ 1)
                along_keys.store(of_half)
                mbarrier.arrive(along_ready.index(0), count=1)
            else:
                # The softmax that weighs the keys of the summary, backward; all threads need all of its keys.
                mbarrier.wait(along_ready.index(0), used & 1)
                along_key = (along_keys.load(by_key) + of_half) * logit_scale
                mbarrier.arrive(along_free.index(0), count=1)
                of_key = of_summary.index(WHICH).load(by_key)
                dlogits = of_key * (along_key - gl.sum(of_key * along_key, 0)) * scale
                mbarrier.wait(dlogits_free.index(0), (used & 1) ^ 1)
                dlogits_buffer.store(dlogits)
                k = k_buffer.load(KEY_LAYOUT).to(gl.float32)
                by_row: gl.constexpr = gl.SliceLayout(1, KEY_LAYOUT)
                dquery_buffer.store(gl.sum(gl.expand_dims(gl.convert_layout(dlogits, by_row), 1) * k, 0))
                fence_async_shared()
                mbarrier.arrive(keys_free.index(0), count=1)
                mbarrier.arrive(dlogits_ready.index(0), count=1)
            used += 1
        turn += 1
        work = wait_listed(list_ptr, listed, turn, piece_slots * C)


@gluon.jit
def wait_for_turn(turn_ptr, piece):
    """Until all earlier pieces have been added to a chunk: the order of additions never varies."""
    turn = gl.atomic_add(turn_ptr, 0)
    while turn < piece:
        turn = gl.atomic_add(turn_ptr, 0)


@gluon.jit
def key_pointers(pointer, key_start, batch_head, S, layout: gl.constexpr, shape: gl.constexpr):
    """To a chunk's rows in K or V, or in their gradients.  [C, D]"""
    D: gl.constexpr = shape.tile.head_dim
    HK: gl.constexpr = shape.tile.kv_heads
    row = (key_start + gl.arange(0, shape.tile.chunk_size, gl.SliceLayout(1, layout))).to(gl.int64)
    if not shape.blocks:
        row = ((batch_head // HK) * S + row) * HK + batch_head % HK
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    return pointer + gl.expand_dims(row * D, 1) + gl.expand_dims(column, 0)


@gluon.jit
def write_summary_weights(k_buffer, of_summary, query_ptr, batch_head, scale, shape: gl.constexpr, WHICH: gl.constexpr):
    """The weights of a chunk's keys in its summary, as `summary_weights`, into shared memory."""
    D: gl.constexpr = shape.tile.head_dim
    column = gl.arange(0, D, gl.SliceLayout(0, KEY_LAYOUT))
    query = gl.load(query_ptr + (batch_head % shape.tile.kv_heads) * D + column).to(gl.float32)
    k = k_buffer.load(KEY_LAYOUT).to(gl.float32)
    logits = gl.sum(k * gl.expand_dims(query, 0), 1) * scale
    exponentials = gl.exp(logits - gl.max(logits, 0))
    of_summary.index(WHICH).store(exponentials / gl.sum(exponentials, 0))
    barrier()  # other threads read what this one wrote


@gluon.jit
def score_tile(
    buffers, barriers, factors, along, tile, count, met, OWN: gl.constexpr, shape: gl.constexpr, WHICH: gl.constexpr
):
    """Weights and gradients of the scores of the met-th tile: of the chunk's own queries or of listed ones, `count` in
    all, the tile-th of them. Returns `along` with their share.
    """
    C: gl.constexpr = shape.tile.chunk_size
    G: gl.constexpr = shape.tile.group
    M: gl.constexpr = shape.rows
    of_scores: gl.constexpr = shape.product(C)
    by_row: gl.constexpr = gl.SliceLayout(1, of_scores)
    by_key: gl.constexpr = gl.SliceLayout(0, of_scores)
    chunk_keys, tile_rings, product_buffers, summary_buffers = buffers
    k, v = chunk_keys
    q_ring, grad_ring, vectors = tile_rings
    weights_buffer, dscores_buffer = product_buffers
    of_summary, _along_keys, _dlogits, _dquery = summary_buffers
    of_ring, of_partitions, _of_chunk = barriers
    ready, _free, _listed, _done, _keys_ready, _keys_free = of_ring
    weights_ready, weights_free, dscores_ready, dscores_free = of_partitions
    factor, scale2, prior_exponent, scale, logit_scale, prior_floor = factors
    slot = met % shape.ring
    phase = (met >> 1) & 1
    mbarrier.wait(ready.index(slot), (met // shape.ring) & 1)
    fence_async_shared()  # the gatherer's copies went through the other proxy
    zeros = gl.zeros([M, C], gl.float32, of_scores)
    raw = warpgroup_mma(q_ring.index(slot), k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dweights = warpgroup_mma(grad_ring.index(slot), v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    first_vector = slot * VECTORS
    place = tile * shape.tile.tokens + gl.arange(0, M, by_row) // G
    real = place < count
    lse2 = gl.where(real, vectors.index(first_vector + 1).load(by_row) * LOG2_E, float("inf"))
    delta = vectors.index(first_vector + 2).load(by_row)
    raw = warpgroup_mma_wait(1, deps=[raw])
    if OWN:
        key = gl.arange(0, C, by_key)
        visible = gl.expand_dims(key, 0) <= gl.expand_dims(place, 1)
        weights = gl.exp2(gl.where(visible, raw * scale2, -float("inf")) - gl.expand_dims(lse2, 1))
    else:
        tau = vectors.index(first_vector).load(by_row)
        of_key = gl.expand_dims(of_summary.index(WHICH).load(by_key), 0)
        slopes = gl.where(real, gl.maximum(gl.sum(raw * of_key, 1) * factor - tau, 0.0), 0.0)
        prior = mean_of_token(slopes * slopes, shape)
        bias = gl.log2(gl.maximum(prior, LEAST_PRIOR))
        if shape.has_sigma:
            bias -= vectors.index(first_vector + 4).load(by_row) / LN_2
        weights = gl.exp2(raw * scale2 + gl.expand_dims(bias * prior_exponent - lse2, 1))
    mbarrier.wait(weights_free.index(WHICH), phase ^ 1)
    weights_buffer.index(WHICH).store(weights.to(weights_buffer.dtype))
    fence_async_shared()
    mbarrier.arrive(weights_ready.index(WHICH), count=1)
    dweights = warpgroup_mma_wait(0, deps=[dweights])
    dscores = weights * (dweights - gl.expand_dims(delta, 1))
    if not OWN:
        ratio = vectors.index(first_vector + 3).load(by_row)
        dbias = mean_of_token(gl.sum(dscores, 1), shape)  # dB / G
        dp = dbias * prior_exponent / gl.maximum(prior, prior_floor)
        dz = (dp - ratio) * slopes
        of_fragments = gl.sum(gl.reshape(raw * gl.expand_dims(dz, 1), [4, 2, 8, C]), 1)
        along += gl.convert_layout(of_fragments, along.type.layout)
        of_key = gl.expand_dims(of_summary.index(WHICH).load(by_key), 0)
        dscores += of_key * gl.expand_dims(dz * (logit_scale / scale), 1)
    mbarrier.wait(dscores_free.index(WHICH), phase ^ 1)
    dscores_buffer.index(WHICH).store(dscores.to(dscores_buffer.dtype))
    fence_async_shared()
    mbarrier.arrive(dscores_ready.index(WHICH), count=1)
    return along


@gluon.jit
def mean_of_token(rows, shape: gl.constexpr):
    """Mean over the heads of a token, for each of its rows.  [M] -> [M]"""
    by_head = gl.reshape(rows, [shape.tile.tokens, shape.tile.group])
    mean = gl.expand_dims(gl.sum(by_head, 1) / shape.tile.group, 1) + gl.zeros_like(by_head)
    return gl.convert_layout(gl.reshape(mean, [shape.rows]), rows.type.layout)

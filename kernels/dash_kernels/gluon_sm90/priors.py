"""Slopes and priors of a block of listed chunks, for the kernels on pairs of tiles, as in `tiles`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from dash_kernels.gluon_sm90.tile_pairs import ID_BITS, barrier, row_offsets
from dash_kernels.triton.tiles import LN_2


@gluon.jit
def load_thresholds(routed, start, step, batch_head, T, shape: gl.constexpr):
    """(tau, mean of log2 P) of a tile's rows.  [M] each"""
    _high_ptr, _low_ptr, tau_ptr, log_mean_ptr = routed
    by_row: gl.constexpr = gl.SliceLayout(1, shape.product(shape.block))
    M: gl.constexpr = shape.rows
    place, row_at = row_offsets(start, step, batch_head, T, by_row, shape)
    tau = gl.load(tau_ptr + row_at)
    log2_mean = gl.zeros([M], gl.float32, by_row)
    if shape.has_sigma:
        token = (batch_head // shape.tile.kv_heads).to(gl.int64) * T + start + place
        log2_mean = gl.load(log_mean_ptr + token * shape.tile.kv_heads + batch_head % shape.tile.kv_heads) / LN_2
    return tau, log2_mean


@gluon.jit
def routing_slopes(
    q, entries, inside, tau, routed, summaries, batch_head, n, factor, shape: gl.constexpr, WHICH: gl.constexpr
):
    """(slopes u = sqrt(p) of a tile for a block of its list, zero where a token did not select the chunk, [M, BN]; the
    high part of the summaries in shared memory, [BN, D]).

    inside: how many of the entries there are.
    """
    high_ptr, low_ptr, _tau_ptr, _log_mean_ptr = routed
    D: gl.constexpr = shape.tile.head_dim
    M: gl.constexpr = shape.rows
    BN: gl.constexpr = shape.block
    of_routing: gl.constexpr = shape.product(BN)
    by_summary: gl.constexpr = entries.type.layout.parent
    high = summaries.index(WHICH * 2)
    low = summaries.index(WHICH * 2 + 1)
    offset = ((batch_head // shape.tile.kv_heads).to(gl.int64) * n + (entries & ID_BITS)) * shape.tile.kv_heads
    offset = (offset + batch_head % shape.tile.kv_heads) * D
    pointers = gl.expand_dims(offset, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, by_summary)), 0)
    high.store(gl.load(high_ptr + pointers))
    low.store(gl.load(low_ptr + pointers))
    fence_async_shared()
    barrier()
    queries = gl.convert_layout(q, shape.factor(BN))
    zeros = gl.zeros([M, BN], gl.float32, of_routing)
    y = warpgroup_mma(queries, high.permute((1, 0)), zeros, use_acc=False, is_async=True)
    y = warpgroup_mma_wait(0, deps=[warpgroup_mma(queries, low.permute((1, 0)), y, is_async=True)])
    present = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, of_routing)) < inside, 0)
    return gl.where(present, gl.maximum(y * factor - gl.expand_dims(tau, 1), 0.0), 0.0), high


@gluon.jit
def log_priors(slopes, shape: gl.constexpr):
    """(prior, its logarithm in base 2, -inf where a token did not select the chunk), the same in all rows of a token.
    [M, BN] each
    """
    G: gl.constexpr = shape.tile.group
    BT: gl.constexpr = shape.tile.tokens
    BN: gl.constexpr = shape.block
    by_head = gl.reshape(slopes * slopes, [BT, G, BN])
    prior = gl.sum(by_head, 1) / G
    log_prior = gl.where(prior > 0, gl.log2(gl.where(prior > 0, prior, 1.0)), -float("inf"))
    return to_rows(prior, by_head, shape), to_rows(log_prior, by_head, shape)


@gluon.jit
def to_rows(tokens, by_head, shape: gl.constexpr):
    """[BT, BN] -> [M, BN], of which by_head [BT, G, BN] is another shape."""
    M: gl.constexpr = shape.rows
    BN: gl.constexpr = shape.block
    rows = gl.reshape(gl.expand_dims(tokens, 1) + gl.zeros_like(by_head), [M, BN])
    return gl.convert_layout(rows, shape.product(BN))

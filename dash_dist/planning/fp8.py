"""Bytes that casts to FP8 move, and those that they hold.

Knows `dash_dist.megatron.fp8`; does not know rates. Casts of weights are made at every call: forward, in the recomputed
forward pass and, of the transposed weight, backward; in a tiled MLP once a tile.
"""

from __future__ import annotations

from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.offload import mlp_weights, runs_mlp_again, tile_tokens
from dash_dist.planning.traffic import BF16

FP8 = 1
_CAST = BF16 + FP8
"""Bytes per number: read, and written."""
_TRANSPOSED = 2 * BF16 + _CAST
"""Bytes per weight: a transposed copy comes before its cast."""


def cast_bytes(sizes: Sizes, layout: Layout) -> int:
    """Return the bytes of a layer's casts for a micro-batch: forward, backward and recomputation; 0 without FP8."""
    if not layout.fp8_linears:
        return 0
    hidden, q, kv, ffn = sizes.hidden, sizes.q, sizes.kv, sizes.ffn
    qkv, proj = q + 2 * kv, layout.recompute.whole or (layout.recompute.projections and sizes.norms_after)
    projections, mlp = layout.recompute.projections, runs_mlp_again(sizes, layout)
    fc2 = mlp and sizes.norms_after
    inputs = 2 * hidden + q + ffn + hidden * (projections + mlp) + q * proj + ffn * fc2
    gradients = qkv + hidden + 2 * ffn + hidden
    tile = tile_tokens(sizes, layout)
    tiles = 1 if tile is None else -(-sizes.tokens // tile)
    of_mlp, of_attention = mlp_weights(sizes) * tiles, hidden * (qkv + q)
    forward = of_attention + of_mlp + hidden * qkv * projections + q * hidden * proj
    forward += of_mlp * 2 // 3 * mlp + of_mlp // 3 * fc2
    return _CAST * (sizes.tokens * (inputs + gradients) + forward) + _TRANSPOSED * (of_attention + of_mlp)


def last_casts(sizes: Sizes, tokens: int) -> int:
    """Return the bytes of the casts that the input gradient of the MLP's second matrix holds: of its output's gradient
    and of the transposed weight, whose copy is there while it is cast."""
    return tokens * sizes.hidden * FP8 + sizes.ffn * sizes.hidden * _CAST


def first_casts(sizes: Sizes) -> int:
    """Return the bytes of the transposed first matrix of the MLP, copied and cast."""
    return 2 * sizes.ffn * sizes.hidden * _CAST

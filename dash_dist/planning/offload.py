"""Bytes and seconds of the tiled MLP, and of inputs and moments that wait on the host.

Knows `dash_dist.megatron.tiled_mlp`, `.offload` and `.host_moments`; does not know the rest of a layer.
"""

from __future__ import annotations

from dataclasses import replace

from dash_dist.config.parallel import offloaded_layers
from dash_dist.planning.activations import Moment, input_of_layer
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.traffic import BF16, FP32

BLOCK_BYTES = 2**26
"""Host memory is taken in blocks, those of `dash_dist.megatron.host_memory`."""

PIECE = 2**26
"""Numbers whose moments are on the device at a time, as in `dash_dist.megatron.host_moments`."""


def tile_tokens(sizes: Sizes, layout: Layout) -> int | None:
    """Return the tokens that an MLP works on at a time; None: on all of the rank's."""
    if layout.mlp_tile_tokens is None:
        return None
    rows = max(1, layout.mlp_tile_tokens // (sizes.batch * sizes.sequence_shards)) * sizes.sequence_shards
    return rows * sizes.batch if rows < sizes.shard else None


def mlp_weights(sizes: Sizes) -> int:
    """Numbers of a layer's MLP at this rank."""
    return 3 * sizes.hidden * sizes.ffn


def runs_mlp_again(sizes: Sizes, layout: Layout) -> bool:
    """The MLP is computed again in the backward pass, by recomputation or by its tiles."""
    return layout.recompute.mlp or tile_tokens(sizes, layout) is not None


def tiled_moment(sizes: Sizes, tile: int, casts: int = 0) -> Moment:
    """Gradients of the half's output and input, a tile's tensors and their gradients, and weight gradients: sums in
    float32, and a tile's. Of shards of the sequence, a tile's gathered gradient as well. casts: bytes of `first_casts`,
    held before the gradient of the first matrix is computed."""
    stream = 3 * sizes.hidden // sizes.sequence_shards + (sizes.hidden if sizes.sequence_shards > 1 else 0)
    of_tile = tile * BF16 * (stream + 3 * sizes.ffn + 2 * sizes.ffn)
    weights = mlp_weights(sizes) * FP32 + max(mlp_weights(sizes) * BF16, sizes.ffn * sizes.hidden * BF16 + casts)
    return Moment("backward of a tiled MLP", activations=2 * input_of_layer(sizes) + of_tile + weights)


def inputs_on_host(sizes: Sizes, layout: Layout, stage: int) -> int:
    """Return how many of a stage's layers have their input on the host."""
    recomputed = layout.recompute.layers or sizes.layers
    return len(offloaded_layers(layout.offload_activations, recomputed, first_stage=stage == 0))


def host_bytes(sizes: Sizes, layout: Layout, stage: int, in_flight: int) -> int:
    """Return the host memory of one rank for micro-batches in flight."""
    blocks = -(-input_of_layer(sizes) // BLOCK_BYTES)
    return in_flight * inputs_on_host(sizes, layout, stage) * blocks * BLOCK_BYTES


def without_offloaded(
    sizes: Sizes, layout: Layout, stage: int, kept: int, moments: list[Moment]
) -> tuple[int, list[Moment]]:
    """Take the inputs on the host from a stage's kept bytes, and add the one that comes back to its moments."""
    away = inputs_on_host(sizes, layout, stage)
    if not away:
        return kept, moments
    one = input_of_layer(sizes)
    return kept - away * one, [replace(moment, activations=moment.activations + one) for moment in moments]


def sum_of_tiles_bytes(sizes: Sizes, layout: Layout) -> int:
    """Return the bytes that a layer's backward pass moves to add up the weight gradients of its tiles."""
    tile = tile_tokens(sizes, layout)
    if tile is None:
        return 0
    return (-(-sizes.tokens // tile)) * mlp_weights(sizes) * (2 * BF16 + 2 * FP32)


def exposed_copies(sizes: Sizes, layout: Layout, stage: int, layer_seconds: float, rate: float) -> float:
    """Return the seconds by which copies take longer than the layers that they overlap, of a micro-batch.

    Args:
        layer_seconds: of a layer's forward and backward pass, recomputation included.
        rate: bytes/s between a device and its host, in one direction.
    """
    copy = input_of_layer(sizes) / rate
    forward = layer_seconds / 4  # of four equal parts: forward, recomputation and a backward pass of two
    late = max(0.0, copy - forward) + max(0.0, copy - 3 * forward)
    return inputs_on_host(sizes, layout, stage) * late


def update_bytes(numbers: int) -> int:
    """Return the temporary bytes of an update from the host: moments of two pieces, one of them on its way."""
    return min(numbers, PIECE) * 2 * 2 * FP32


def moments_seconds(numbers: int, rate: float) -> float:
    """Return the seconds of bringing both moments of so many numbers to the device and back; nothing hides them."""
    return 2 * 2 * numbers * FP32 / rate

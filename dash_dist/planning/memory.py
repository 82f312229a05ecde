"""Memory of one rank by kind, at the fullest moment of a step.

Knows which micro-batches of a pipeline are in flight and what stays between steps. Does not know speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dash_dist.planning import activations, fp8, loss, offload
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.layers import LayerPlan, by_recomputation
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.sharding import State
from dash_dist.planning.traffic import BF16, FP32

GIB = 2**30
_CUBLAS = 32 * 2**20  # its work space on Hopper, in torch's allocator
_BATCH = 2 * activations.INT64 + 1  # of a token: itself, its label, and whether it counts


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, optimizer: see `State`.
        activations: what is saved for the backward pass of every micro-batch in flight, and what comes and goes.
        attention: work space of the attention, where the fullest moment is one of the attention.
        communication: K, V and gradients of other ranks, likewise.
        host: pinned memory of the host, which no device's total counts.
        reserve: CUDA's context, NCCL's buffers, and what the allocator reserves in vain.
        moment: the fullest one.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    attention: float
    communication: float
    reserve: float
    moment: str
    host: float = 0.0

    @property
    def allocated(self) -> float:
        """The peak that torch's allocator reports (memory/allocated_peak_gib of a run)."""
        return self.total - self.reserve

    @property
    def total(self) -> float:
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.activations + self.attention + self.communication + self.reserve


def stage_memory(
    sizes: Sizes,
    layout: Layout,
    stage: int,
    layers: Sequence[LayerPlan],
    assumptions: Assumptions,
    *,
    state: State,
    offload_moments: float = 0.0,
) -> Memory:
    """Predict the memory of a rank of pipeline stage `stage` with these layers, which keeps `state`.

    Args:
        offload_moments: `OptimizerConfig.offload_moments`.
    """
    base, saved, moments = _activations(sizes, layout, stage, layers)
    # No activation is left, and the update of moments on the device works in place.
    away = round(offload_moments * state.numbers)
    step = activations.Moment("optimizer step", activations=offload.update_bytes(away) + state.update, freed=saved)
    fullest = max([*moments, step], key=lambda moment: moment.total)
    held = base + saved + fullest.activations - fullest.freed + assumptions.memory_offset
    in_flight = micro_batches_in_flight(layout, stage, sizes.micro_batches)
    several = layout.gpus > 1
    working = held + fullest.attention + fullest.exchange
    reserve = (assumptions.context_gib + assumptions.nccl_gib * several) * GIB + assumptions.fragmentation * working
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer - 2 * away * FP32,
        activations=held,
        attention=fullest.attention,
        communication=fullest.exchange,
        reserve=reserve,
        moment=fullest.name,
        host=offload.host_bytes(sizes, layout, stage, in_flight) + 2 * away * FP32,
    )


def micro_batches_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Forward passes whose backward pass has not ended, at most, in the 1F1B schedule."""
    return min(layout.pipeline - stage, micro_batches)


def _activations(
    sizes: Sizes, layout: Layout, stage: int, layers: Sequence[LayerPlan]
) -> tuple[int, int, list[activations.Moment]]:
    """(bytes held all step, bytes saved when the fullest moments come, those moments)"""
    last = stage == layout.pipeline - 1
    kept, of_layer = 0, []
    # From the last layers, whose backward pass comes first, to the first ones, which are those that are recomputed.
    for part, of_part in reversed(by_recomputation(layers, layout)):
        by_layer = {layer: _kept_and_moments(sizes, part, layer) for layer in dict.fromkeys(of_part)}
        kept_by_part = sum(by_layer[layer][0] for layer in of_part)
        found = [moment for _, moments in by_layer.values() for moment in moments]
        if part.recompute.whole:
            kept_by_part, found = offload.without_offloaded(sizes, layout, stage, kept_by_part, found)
        of_layer += [replace(moment, freed=moment.freed + kept) for moment in found]
        kept += kept_by_part
    in_flight = micro_batches_in_flight(layout, stage, sizes.micro_batches)
    saved = in_flight * (kept + sizes.shard * sizes.head_dim * FP32)  # and the rotary angles
    moments = of_layer
    if last:
        # The fullest moments of layers are those of the last one, when the loss is done with.
        fused = loss.is_fused(layout)
        of_loss = loss.saved_by_loss(sizes, fused=fused)
        saved += of_loss
        # A matrix that is the embedding as well waits for the embedding's gradient.
        waits = sizes.vocab * sizes.hidden * BF16 if fused and sizes.tied and layout.pipeline == 1 else 0
        moments = [replace(moment, freed=moment.freed + of_loss - waits) for moment in of_layer]
        moments.append(loss.loss_moment(sizes, fused=fused))
    # Megatron-core gathers the shards of a projection's input into one buffer, which stays.
    base = sizes.micro_batches * sizes.tokens * _BATCH + _CUBLAS + activations.gathered_stream(sizes)
    return base, saved, moments


def _kept_and_moments(sizes: Sizes, layout: Layout, layer: LayerPlan) -> tuple[int, list[activations.Moment]]:
    """Bytes that a layer keeps for its backward pass, and the fullest moments of that pass."""
    kind, exchange, recompute = layer.kind, layer.exchange, layout.recompute
    tile = offload.tile_tokens(sizes, layout)
    tiled = tile is not None
    kept = activations.kept_by_layer(sizes, kind, exchange, recompute, tiled=tiled)
    saved = activations.saved_by_layer(sizes, kind, exchange, tiled=tiled)
    in_fp8 = layout.fp8_linears
    mlp = activations.mlp_moment(sizes, fp8.last_casts(sizes, sizes.tokens) * in_fp8)
    attention = activations.attention_moment(sizes, kind, exchange)
    if tile is not None:
        mlp = offload.tiled_moment(sizes, tile, fp8.first_casts(sizes) * in_fp8)
        of_mlp = activations.saved_by_layer(sizes, kind, exchange).mlp
        attention = replace(attention, freed=attention.freed - of_mlp)
    # The part that is recomputed has no output; of a whole layer, its input is the one that was kept.
    if recompute.whole:
        again = saved.total - kept
        mlp = replace(mlp, activations=mlp.activations + again)
        attention = replace(attention, activations=attention.activations + again)
        if recompute.attention:  # the second pass has K and V of other ranks, for the backward pass
            mlp = replace(mlp, exchange=activations.received_by_exchange(sizes, exchange))
    elif recompute.mlp and not tiled:
        mlp = replace(mlp, activations=mlp.activations + saved.mlp)
        attention = replace(attention, freed=attention.freed - saved.mlp)
    elif recompute.projections:
        attention = replace(attention, activations=attention.activations + saved.projections)
    return kept, [mlp, attention]

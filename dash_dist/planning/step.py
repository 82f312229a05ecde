"""Seconds of a step by part, from operations and bytes.

Knows how the engine runs a step: which communication blocks and which overlaps computation. Does not know memory.

A layer's pass takes as long as its matrix products at a share of the peak, its attention as measured, its element-wise
kernels at a share of the memory bandwidth, and the communication that nothing hides; or as long as the host takes to
launch it. In the code as it is,

- an exchange of K and V overlaps the attention on the rank's own shard (the ring: on all parts; a halo: on none);
- tensor-parallel all-reduces block the forward pass; in the backward pass they overlap the weight's gradient. With
  sequence parallelism each is a reduce-scatter and an all-gather: gathering a projection's input once more overlaps the
  gradient of that input, summing that gradient overlaps the weight's, and the other all-gathers block;
- a pipeline's sends block, and its stages idle for pipeline - 1 micro-batches;
- gradients are summed after the last backward pass, and weights gathered after the optimizer; neither overlaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dash_dist.cost_model.exchange import exposed
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.attention_time import AttentionTime
from dash_dist.planning.fp8 import cast_bytes
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.offload import mlp_weights, runs_mlp_again, sum_of_tiles_bytes
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.traffic import BF16, Bytes, ExchangePlan

# Selected chunks of the busiest rank / of the mean one, by layout: docs/results/cp_2xh200.json, two ranks.
_IMBALANCE = {"zigzag": 1.07, "double_zigzag": 1.03, "contiguous": 1.27}
_BACKWARD_OF_FORWARD = 2  # products of a backward pass / of a forward pass

# Bytes that element-wise kernels read and write per token, in numbers of bfloat16 of a width.
_NORM, _SUM = 2, 3  # forward
_ELEMENTWISE = {
    # width: (forward, backward)
    # norms, backward 3 + 3, and residual additions; gradients of the branches are added
    "hidden": (2 * _NORM + 2 * _SUM, 12),
    # out of the projection and rotated in one pass, and back
    "q": (2, 2),
    # likewise, keys and values
    "kv": (4, 4),
    # both halves read, the product written; backward both halves and a gradient read, two written
    "ffn": (3, 5),
}
_WEIGHT_GRADIENT = 12  # bytes per weight and micro-batch: written in bfloat16, added to float32
_STEP_PER_GRADIENT = 12  # bytes per number of the gradients' buffer: cleared, and divided by the number of tokens
# Bytes per number of this rank's optimizer state: the norm reads 4, clipping 8, AdamW reads four numbers and writes
# three, and rounding to bfloat16 moves 6.
_STEP_PER_STATE = 4 + 8 + 28 + 6


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. What waits for nothing else; a pipeline's idle time by itself.

    Attributes:
        matmul, attention, elementwise: computation of all micro-batches of the slowest stage.
        launch: what the host's launches take beyond that.
        exchange, tensor, pipeline: communication that nothing hides, by kind of parallelism.
        bubble: a stage waits for the others.
        offload: copies between devices and hosts that nothing hides.
        reduction: gradients summed and weights gathered over the ranks that hold the same ones.
        optimizer: gradients cleared, clipped, and the update.
    """

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    launch: float = 0.0
    exchange: float = 0.0
    tensor: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    reduction: float = 0.0
    optimizer: float = 0.0
    offload: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> StepTime:
        return StepTime(*(mine * times for mine in vars(self).values()))


@dataclass(frozen=True)
class Pace:
    """Rates of a rank."""

    machine: Machine
    assumptions: Assumptions

    def products(self, operations: float, *, fp8: bool = False) -> float:
        efficiency = 2 * self.assumptions.fp8_efficiency if fp8 else self.assumptions.matmul_efficiency
        return operations / (self.machine.gpu.flops * efficiency) * self.assumptions.dense_factor

    def elementwise(self, size: float) -> float:
        bandwidth = self.machine.gpu.bandwidth * self.assumptions.memory_efficiency
        return size / bandwidth * self.assumptions.dense_factor

    def attention(self, seconds: float) -> float:
        return seconds * self.machine.gpu.attention_time * self.assumptions.attention_factor

    def send(self, size: Bytes, messages: int = 1) -> float:
        return self.machine.links.seconds(size.nvlink, size.network, messages=messages)

    def reduce(self, size: Bytes) -> float:
        """A ring over all links at once: the slower kind is what it takes."""
        return max(size.nvlink / self.machine.gpu.nvlink, size.network / self.machine.network)


def layer_matmul(sizes: Sizes) -> float:
    """Operations of a layer's matrix products, forward, of one micro-batch on one rank."""
    weights = sizes.hidden * (sizes.q + 2 * sizes.kv) + sizes.q * sizes.hidden + 3 * sizes.hidden * sizes.ffn
    return 2.0 * sizes.tokens * weights


def recomputed_matmul(sizes: Sizes, layout: Layout) -> float:
    """Operations of the matrix products that are computed again, likewise, by recomputation or by tiles."""
    weights = sizes.hidden * (sizes.q + 2 * sizes.kv) * layout.recompute.projections
    weights += sizes.q * sizes.hidden * _projects_again(sizes, layout)
    weights += mlp_weights(sizes) * 2 // 3 * runs_mlp_again(sizes, layout)
    weights += mlp_weights(sizes) // 3 * (sizes.norms_after and runs_mlp_again(sizes, layout))
    return 2.0 * sizes.tokens * weights


def fp8_matmul(sizes: Sizes, layout: Layout) -> float:
    """Operations of a layer's products in FP8, of one micro-batch: all but those of the weights' gradients."""
    return (2 * layer_matmul(sizes) + recomputed_matmul(sizes, layout)) * layout.fp8_linears


def sums_again(sizes: Sizes, layout: Layout) -> float:
    """Tensor-parallel all-reduces of a layer's forward pass that are computed again.

    With sequence parallelism each is a gathering before the products and a scattering after them, half of it each.
    """
    sums = _projects_again(sizes, layout) + (sizes.norms_after and runs_mlp_again(sizes, layout))
    if sizes.sequence_shards == 1:
        return sums
    return (layout.recompute.projections + runs_mlp_again(sizes, layout) + sums) / 2


def _projects_again(sizes: Sizes, layout: Layout) -> bool:
    """Tell whether the projection after the attention is recomputed: for the MLP or a norm, which read its output."""
    recompute = layout.recompute
    return recompute.whole or (recompute.projections and sizes.norms_after)


def _recomputed_numbers(sizes: Sizes, layout: Layout) -> float:
    """Numbers per token that element-wise kernels read and write again."""
    recompute, width = layout.recompute, _widths(sizes)
    q, kv, ffn = (_ELEMENTWISE[name][0] * width[name] for name in ("q", "kv", "ffn"))
    of_projections = (_NORM + _SUM * recompute.whole) * width["hidden"] + q + kv
    return of_projections * recompute.projections + (_NORM * width["hidden"] + ffn) * runs_mlp_again(sizes, layout)


def _widths(sizes: Sizes) -> dict[str, float]:
    """Numbers of `_ELEMENTWISE` for each token of the rank's attention."""
    return {
        "hidden": sizes.hidden / sizes.sequence_shards,
        "q": sizes.q,
        "kv": sizes.kv,
        "ffn": sizes.ffn,
    }


def _tensor_time(sizes: Sizes, pace: Pace, all_reduce: Bytes, *, forward: float, fp8: bool) -> float:
    """Return the exposed seconds of tensor parallelism in a layer, of which `forward` all-reduces are in forward
    passes."""
    one = pace.send(all_reduce, 2)
    # Operations of the projection and of the MLP's first matrix, and of either of their gradients.
    operations = [2.0 * sizes.tokens * sizes.hidden * width for width in (sizes.q + 2 * sizes.kv, 2 * sizes.ffn)]
    of_weights = [pace.products(one) for one in operations]
    if sizes.sequence_shards == 1:
        return one * forward + exposed([one] * 2, of_weights)
    of_inputs = [pace.products(one, fp8=fp8) for one in operations]
    half = one / 2
    return one * forward + 2 * half + exposed([half] * 4, of_inputs + of_weights)


def layer_time(
    sizes: Sizes,
    layout: Layout,
    pace: Pace,
    attention: AttentionTime,
    exchange: ExchangePlan,
    all_reduce: Bytes,
    *,
    uneven: float,
) -> StepTime:
    """Forward and backward pass of one layer and micro-batch, recomputation included.

    Args:
        attention: on an H200, of the mean rank.
        all_reduce: of one tensor-parallel all-reduce, or its two halves; there are two in each pass.
        uneven: attention of the busiest rank / of the mean one.
    """
    stage3 = pace.attention(attention.attend) * uneven, pace.attention(attention.backward) * uneven
    route = pace.attention(attention.route)
    recompute = layout.recompute
    passes = 2 if recompute.attention else 1
    parts = recompute.projections + runs_mlp_again(sizes, layout)
    in_fp8 = fp8_matmul(sizes, layout)
    products = layer_matmul(sizes) * (1 + _BACKWARD_OF_FORWARD) + recomputed_matmul(sizes, layout)
    widths = _widths(sizes)
    forward, backward = (
        pace.elementwise(BF16 * sizes.tokens * sum(_ELEMENTWISE[name][i] * width for name, width in widths.items()))
        for i in (0, 1)
    )
    weights = layer_matmul(sizes) / (2 * sizes.tokens)
    backward += pace.elementwise(_WEIGHT_GRADIENT * weights + sum_of_tiles_bytes(sizes, layout))
    again = pace.elementwise(BF16 * sizes.tokens * _recomputed_numbers(sizes, layout) + cast_bytes(sizes, layout))
    computed = StepTime(
        matmul=pace.products(products - in_fp8) + pace.products(in_fp8, fp8=True),
        attention=route + stage3[0] * passes + stage3[1],
        elementwise=forward + backward + again,
    )
    tensor = 0.0
    if layout.tensor > 1:
        tensor = _tensor_time(sizes, pace, all_reduce, forward=2 + sums_again(sizes, layout), fp8=layout.fp8_linears)
    launched = pace.assumptions.host_seconds * (3 + parts / 2)
    waited = StepTime(tensor=tensor, exchange=_exchange_time(layout, pace, exchange, stage3))
    return computed + waited + StepTime(launch=max(0.0, launched - computed.total - waited.total))


def _exchange_time(layout: Layout, pace: Pace, exchange: ExchangePlan, stage3: tuple[float, float]) -> float:
    """Return the seconds of an exchange that no computation hides."""
    if exchange.name == "none":
        return 0.0
    share = {"ring": 1.0, "halo": 0.0}.get(exchange.name, 1 / layout.context)  # of the attention that overlaps it
    passes = exchange_passes(exchange, layout.recompute)
    half = exchange.messages // 2
    forward, backward = pace.send(exchange.forward, half), pace.send(exchange.backward, half)
    if passes == 2 and exchange.name not in ("ring", "halo"):
        # K and V of the recomputation are still there in the backward pass, to which gradients are left.
        backward -= forward
    transfers = [forward] * passes + [backward]
    beside = [stage3[0] * share] * passes + [stage3[1] * share]
    merging = exchange.merged / (pace.machine.gpu.bandwidth * pace.assumptions.memory_efficiency)
    return (
        exposed(transfers, beside)
        + passes * pace.send(exchange.summaries)
        + pace.send(exchange.summary_gradients)
        + merging
    )


def exchange_passes(exchange: ExchangePlan, recompute: Recompute) -> int:
    """Forward passes of a layer that fetch K and V: a halo is fetched for queries, keys and values as they are made."""
    again = recompute.projections if exchange.name == "halo" else recompute.attention
    return 2 if again else 1


def imbalance(sequence_layout: str, ranks: int) -> float:
    """Attention of the busiest context-parallel rank / of the mean one; of more than two ranks as of two."""
    return _IMBALANCE[sequence_layout] if ranks > 1 else 1.0


def embedding_time(sizes: Sizes, pace: Pace) -> StepTime:
    """Rows looked up, and their gradients added up."""
    rows = 4 * sizes.tokens * sizes.hidden * BF16
    return StepTime(elementwise=pace.elementwise(rows + 2 * sizes.vocab * sizes.hidden * BF16))


def optimizer_time(numbers: int, of_optimizer: int, pace: Pace) -> StepTime:
    """Predict the optimizer's seconds for a buffer of gradients, a share of them in this rank's optimizer state."""
    return StepTime(optimizer=pace.elementwise(_STEP_PER_GRADIENT * numbers + _STEP_PER_STATE * of_optimizer))

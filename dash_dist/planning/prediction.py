"""A prediction: memory, operations, bytes and seconds of a configuration on a layout.

Puts the parts together; knows no constant itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dash_dist.config.attention import Kind
from dash_dist.config.run import RunConfig
from dash_dist.engine.flops import flops_per_token
from dash_dist.planning.activations import input_of_layer
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layers import LayerPlan, by_recomputation, foremost, of_stage, plan_layers
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.loss import is_fused, loss_time, output_passes
from dash_dist.planning.memory import Memory, stage_memory
from dash_dist.planning.offload import exposed_copies, moments_seconds
from dash_dist.planning.parameters import layer_weights, stage_numbers
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.sharding import Sharding
from dash_dist.planning.step import (
    Pace,
    StepTime,
    embedding_time,
    exchange_passes,
    fp8_matmul,
    layer_matmul,
    layer_time,
    optimizer_time,
    recomputed_matmul,
    sums_again,
)
from dash_dist.planning.traffic import BF16, Bytes, ExchangePlan, all_reduce

TIGHT = 0.95
"""Part of a device's memory above which a run warns of its plan."""


@dataclass(frozen=True)
class Prediction:
    """Prediction for one layout, for its worst rank: memory of the fullest pipeline stage, bytes of the busiest.

    Attributes:
        memory: of the first and the last pipeline stage; those between hold less if they train as many parameters.
        flops: operations that a rank executes in a step: matrix products and attention, recomputation included.
        model_flops: operations that a step is worth over all ranks (`dash_dist.megatron.flops`).
        sent: bytes that a rank sends in a step, by purpose.
        exchange: of one micro-batch and one layer, one that selects chunks if there is any.
        time: of a step.
        mfu: model FLOPs utilisation.
        tokens: of a global batch.
        budget: bytes of a GPU.
    """

    layout: Layout
    memory: tuple[Memory, ...]
    flops: float
    model_flops: float
    sent: dict[str, Bytes]
    exchange: ExchangePlan
    time: StepTime
    mfu: float
    tokens: int
    budget: float

    @property
    def fullest_stage(self) -> int:
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def peak(self) -> Memory:
        """Memory of the fullest stage."""
        return self.memory[self.fullest_stage]

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.budget

    @property
    def is_tight(self) -> bool:
        """A run warns before its first step."""
        return self.peak.total > TIGHT * self.budget

    @property
    def seconds(self) -> float:
        return self.time.total


def predict(
    config: RunConfig, layout: Layout, machine: Machine, assumptions: Assumptions, *, vocab_size: int
) -> Prediction:
    """
    Args:
        config: its `parallel` and `attention.exchange` are not read: `layout` is.
        vocab_size: tokens of the tokenizer.
    """
    sizes = Sizes.of(config, layout, vocab_size=vocab_size, document_length=assumptions.document_length)
    layers = plan_layers(config, sizes, layout, machine, assumptions)
    sharding = Sharding.of(config)
    numbers = {
        stage: stage_numbers(
            sizes,
            pipeline=layout.pipeline,
            stage=stage,
            replicas=layout.weight_replicas,
            tie_embeddings=config.model.tie_embeddings,
            distributed_optimizer=sharding.buffers,
            trainable=config.trainable,
        )
        for stage in (0, layout.pipeline - 1)
    }
    largest = max(sum(weight.numbers for weight in layer_weights(sizes, 0)), sizes.vocab * sizes.hidden)
    states = {stage: sharding.state(count, layout, largest_layer=largest) for stage, count in numbers.items()}
    memory = tuple(
        stage_memory(
            sizes,
            layout,
            stage,
            of_stage(layers, layout, stage),
            assumptions,
            state=state,
            offload_moments=config.optimizer.offload_moments,
        )
        for stage, state in states.items()
    )
    most = max(count.trained for count in numbers.values())
    whole = max(count.weights for count in numbers.values())
    sent = _bytes(sizes, layout, machine, layers)
    sent["gradients"] = sharding.sent(most, whole, layout, machine, micro_batches=sizes.micro_batches)
    pace = Pace(machine, assumptions)
    of_optimizer = max(state.numbers for state in states.values())
    time = _time(sizes, layout, pace, layers, sent) + optimizer_time(most, of_optimizer, pace)
    away = round(config.optimizer.offload_moments * of_optimizer)
    time += StepTime(offload=moments_seconds(away, machine.gpu.host_rate))
    tokens = config.training.tokens_per_step
    model_flops = tokens * flops_per_token(
        config.model,
        config.attention,
        vocab_size=vocab_size,
        document_length=sizes.document,
        density=assumptions.density,
    )
    return Prediction(
        layout=layout,
        memory=memory,
        flops=_executed(sizes, layout, layers),
        model_flops=model_flops,
        sent=sent,
        exchange=foremost(layers).exchange,
        time=time,
        mfu=model_flops / (time.total * layout.gpus * machine.gpu.flops),
        tokens=tokens,
        budget=machine.memory,
    )


def _bytes(sizes: Sizes, layout: Layout, machine: Machine, layers: Sequence[LayerPlan]) -> dict[str, Bytes]:
    """Return the bytes of a step by purpose, of the busiest stage; those for gradients come from the sharding."""
    one = all_reduce(sizes.tokens * sizes.hidden * BF16, layout.tensor, 1, machine)
    # Shards of the sequence that a projection multiplied are gathered again for the gradients of its weights.
    of_layer = 4 if sizes.sequence_shards == 1 else 5
    pipeline = Bytes()
    if layout.pipeline > 1:
        sends = 2 * input_of_layer(sizes) * sizes.micro_batches
        within_node = layout.gpus // layout.pipeline < machine.gpus_per_node
        pipeline = Bytes(sends) if within_node else Bytes(0.0, sends)
    exchanged, summaries = [], []
    for stage in range(layout.pipeline):
        parts = by_recomputation(of_stage(tuple(layers), layout, stage), layout)
        exchanges = [(layer.exchange, part.recompute) for part, of_part in parts for layer in of_part]
        exchanged.append(sum((_exchanged(*one) for one in exchanges), Bytes()))
        of_summaries = (one.summaries * exchange_passes(one, how) + one.summary_gradients for one, how in exchanges)
        summaries.append(sum(of_summaries, Bytes()))
    # As many in every stage.
    sums = sum((of_layer + sums_again(sizes, part)) * len(of_part) for part, of_part in parts)
    return {
        "exchange": max(exchanged, key=_total) * sizes.micro_batches,
        "summaries": max(summaries, key=_total) * sizes.micro_batches,
        "tensor": one * (sums * sizes.micro_batches),
        "pipeline": pipeline,
    }


def _exchanged(exchange: ExchangePlan, recompute: Recompute) -> Bytes:
    """Return the bytes of K, V and gradients: the backward pass takes those of the recomputation, but from a ring."""
    again = exchange.name in ("halo", "ring")
    forward = exchange.forward * (exchange_passes(exchange, recompute) if again else 1)
    return forward + exchange.backward


def _total(size: Bytes) -> float:
    return size.nvlink + size.network


def _time(
    sizes: Sizes,
    layout: Layout,
    pace: Pace,
    layers: tuple[LayerPlan, ...],
    sent: dict[str, Bytes],
) -> StepTime:
    one = all_reduce(sizes.tokens * sizes.hidden * BF16, layout.tensor, 1, pace.machine)
    by_kind = {layer.kind: layer for layer in layers}
    times: dict[tuple[Kind, int], StepTime] = {}
    stages = []
    for stage in range(layout.pipeline):
        computed = StepTime()
        for place, (part, of_part) in enumerate(by_recomputation(of_stage(layers, layout, stage), layout)):
            for kind, count in Counter(layer.kind for layer in of_part).items():
                if (kind, place) not in times:
                    layer = by_kind[kind]
                    times[kind, place] = layer_time(
                        sizes, part, pace, layer.time, layer.exchange, one, uneven=layer.uneven
                    )
                computed += times[kind, place] * count
        late = exposed_copies(sizes, layout, stage, computed.total / sizes.layers, pace.machine.gpu.host_rate)
        stages.append(computed + StepTime(offload=late))
    stages[0] += embedding_time(sizes, pace)
    stages[-1] += loss_time(sizes, pace, fused=is_fused(layout))
    slowest = max(stages, key=lambda time: time.total)
    time = slowest * sizes.micro_batches
    if layout.pipeline > 1:
        others = sum(stage.total for stage in stages) - slowest.total
        sends = pace.send(sent["pipeline"], 2 * sizes.micro_batches)
        time = time + StepTime(bubble=others, pipeline=sends)
    if layout.weight_replicas > 1:
        time = time + StepTime(reduction=pace.reduce(sent["gradients"]))
    return time


def executed_products(sizes: Sizes, layout: Layout, *, fused: bool) -> float:
    """Operations of a step's matrix products on a rank of the last pipeline stage, those of attention left out.

    Args:
        fused: the output layer computes the gradients of a piece of the loss at once.
    """
    parts = by_recomputation(range(sizes.layers), layout)
    products = sum((3 * layer_matmul(sizes) + recomputed_matmul(sizes, part)) * len(of_part) for part, of_part in parts)
    output = 2.0 * sizes.tokens * sizes.vocab * sizes.hidden * output_passes(sizes, fused=fused)
    return (products + output) * sizes.micro_batches


def fp8_products(sizes: Sizes, layout: Layout) -> float:
    """Operations of those products that a step computes in FP8."""
    parts = by_recomputation(range(sizes.layers), layout)
    return sum(fp8_matmul(sizes, part) * len(of_part) for part, of_part in parts) * sizes.micro_batches


def _executed(sizes: Sizes, layout: Layout, layers: tuple[LayerPlan, ...]) -> float:
    """Operations of a rank of the last pipeline stage; the tiles' waste is not counted."""
    attention = 0.0
    for part, of_part in by_recomputation(of_stage(layers, layout, layout.pipeline - 1), layout):
        passes = 2 if part.recompute.attention else 1
        for layer in of_part:
            selected = sizes.tokens * sizes.query_heads * layer.attended * 4 * sizes.head_dim
            routed = sizes.tokens * sizes.query_heads * layer.routed * 2 * sizes.head_dim
            # Stage 3 is two products forward, and seven backward: three for the queries, four for the keys; flash
            # kernels, which windows take, have five.
            attention += selected * (passes + (3.5 if layer.routed else 2.5)) + routed * 3
    return attention * sizes.micro_batches + executed_products(sizes, layout, fused=is_fused(layout))

"""All layouts of a run on so many GPUs, and the best of them.

Knows what can be varied; does not know how a prediction is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from dash_dist.config.deepspeed import check_engine
from dash_dist.config.run import RunConfig
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.prediction import Prediction, predict
from dash_dist.planning.recompute import WAYS

EXCHANGES = ("selective", "allgather", "ring")


def layouts(config: RunConfig, machine: Machine) -> Iterator[Layout]:
    """Every layout that the configuration's model, sequence and batch allow on these GPUs.

    Tensor parallelism stays inside a node, where its all-reduces are fast. Without context parallelism there is no
    exchange to choose.
    """
    for tensor in _divisors(machine.gpus):
        if tensor > machine.gpus_per_node:
            break
        for pipeline in _divisors(machine.gpus // tensor):
            for context in _divisors(machine.gpus // (tensor * pipeline)):
                if not _is_possible(config, tensor, pipeline, context, machine.gpus):
                    continue
                data = machine.gpus // (tensor * pipeline * context)
                for exchange in EXCHANGES if context > 1 else (config.attention.exchange,):
                    for recompute in WAYS:
                        yield Layout(
                            tensor,
                            context,
                            pipeline,
                            data,
                            exchange,
                            recompute,
                            config.parallel.mlp_tile_tokens,
                            config.parallel.offload_activations if recompute.whole else 0.0,
                            config.parallel.sequence_parallel is not False,
                            config.parallel.fp8_linears,
                        )


def fewest_layers(
    config: RunConfig, layout: Layout, machine: Machine, assumptions: Assumptions, *, vocab_size: int
) -> Prediction:
    """Predict a layout that recomputes the fewest layers of a stage with which it fits without being tight.

    Where there is no such number, all layers are recomputed.
    """

    def of(layers: int | None) -> Prediction:
        one = replace(layout, recompute=layout.recompute.of_layers(layers))
        return predict(config, one, machine, assumptions, vocab_size=vocab_size)

    best = of(None)
    if best.is_tight or layout.recompute.mode == "none":
        return best
    fewest, enough = 1, config.model.num_layers // layout.pipeline
    while fewest < enough:
        found = of((fewest + enough) // 2)
        if not found.is_tight:
            best, enough = found, (fewest + enough) // 2
        else:
            fewest = (fewest + enough) // 2 + 1
    return best


def best_layouts(
    config: RunConfig, machine: Machine, assumptions: Assumptions, *, vocab_size: int, count: int = 3
) -> tuple[list[Prediction], list[Prediction]]:
    """The fastest layouts that fit, each with the exchange and recomputation that are fastest for it, and all that were
    looked at.

    Of two that differ in nothing but these only the faster one is among the best. Where a layout fits by recomputation
    alone and could be among them, the smallest numbers of layers are looked at as well.
    """
    looked_at = [
        predict(config, layout, machine, assumptions, vocab_size=vocab_size) for layout in layouts(config, machine)
    ]
    best = _fastest(looked_at, count)
    slowest = best[-1].seconds if len(best) == count else math.inf
    partly: list[Prediction] = []
    for first in range(0, len(looked_at), len(WAYS)):
        none, *ways = looked_at[first : first + len(WAYS)]
        if none.fits or none.seconds > slowest:
            continue
        for way in ways:
            if way.fits:
                partly.append(fewest_layers(config, way.layout, machine, assumptions, vocab_size=vocab_size))
    looked_at += [one for one in partly if one.layout.recompute.layers is not None]
    return _fastest(looked_at, count), looked_at


def _fastest(looked_at: list[Prediction], count: int) -> list[Prediction]:
    best: list[Prediction] = []
    for prediction in sorted((one for one in looked_at if one.fits), key=lambda one: one.seconds):
        if all(_sizes(prediction.layout) != _sizes(other.layout) for other in best):
            best.append(prediction)
        if len(best) == count:
            break
    return best


def _sizes(layout: Layout) -> tuple[int, int, int, int]:
    return layout.tensor, layout.context, layout.pipeline, layout.data


def _is_possible(config: RunConfig, tensor: int, pipeline: int, context: int, gpus: int) -> bool:
    parallel = config.parallel.model_copy(update={"tensor": tensor, "pipeline": pipeline, "context": context})
    attention = config.attention.model_copy(update={"ranks_per_node": None})
    try:
        config.model_copy(update={"parallel": parallel, "attention": attention}).check_world_size(gpus)
        if config.engine == "deepspeed":
            check_engine(parallel, config.deepspeed)
    except ValueError:
        return False
    return True


def _divisors(value: int) -> list[int]:
    return [candidate for candidate in range(1, value + 1) if value % candidate == 0]

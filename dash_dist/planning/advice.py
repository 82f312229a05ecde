"""Advice where no layout fits, or the configuration's own does not.

Knows which single changes to try; does not know how a prediction is made.
"""

from __future__ import annotations

from dataclasses import replace

from dash_dist.config.run import RunConfig
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.prediction import Prediction, predict
from dash_dist.planning.recompute import more_than
from dash_dist.planning.search import best_layouts, layouts

GIB = 2**30
MORE_GPUS = 2**14
"""The search for a number of GPUs that is enough ends here."""


def what_would_help(
    config: RunConfig,
    machine: Machine,
    assumptions: Assumptions,
    asked: Prediction | None,
    best: list[Prediction],
    looked_at: list[Prediction],
    *,
    vocab_size: int,
) -> list[str]:
    """Lines to print: the smallest change that makes the configuration's layout fit; or, where no layout fits, how much
    the nearest one lacks and what would be enough."""
    if best:
        if asked is None or asked.fits:
            return []
        change = smallest_change(config, machine, assumptions, asked.layout, vocab_size=vocab_size)
        return [f"\nThe smallest change that fits: {change}" if change else "\nNo single change of its layout fits."]
    if not looked_at:
        return [
            f"\nNo layout is possible on {machine.gpus} GPUs: the data-parallel size that is left over must divide "
            f"training.global_batch_size {config.training.global_batch_size} (in micro-batches of "
            f"{config.training.micro_batch_size}), and parallel.tensor, parallel.pipeline and parallel.context must "
            "divide heads, layers and sequence: change --gpus or training.global_batch_size"
        ]
    nearest = min(looked_at, key=lambda one: one.peak.total)
    peak = nearest.peak
    lines = [
        f"\nNo layout of {len(looked_at)} fits in {machine.memory / GIB:.1f} GiB.",
        f"The nearest, {nearest.layout}, takes {peak.total / GIB:.1f} GiB: "
        f"{(peak.total - machine.memory) / GIB:.1f} GiB too much; {_largest_part(nearest)}",
    ]
    enough = _enough_gpus(config, machine, assumptions, vocab_size=vocab_size)
    if enough is not None:
        gpus, prediction = enough
        lines.append(f"{gpus} GPUs are enough, with {prediction.layout} ({prediction.peak.total / GIB:.1f} GiB)")
    lines.append(
        f"or GPUs with {peak.total / GIB:.0f} GiB" if enough else f"GPUs with {peak.total / GIB:.0f} GiB are enough"
    )
    return lines


def smallest_change(
    config: RunConfig, machine: Machine, assumptions: Assumptions, layout: Layout, *, vocab_size: int
) -> str | None:
    """Recompute more first, then context, tensor and pipeline parallelism in place of data parallelism, each doubled
    until it fits; then both."""
    more_recomputed = {way: way.overrides(layout.recompute) for way in more_than(layout.recompute)}
    tried = [(words, replace(layout, recompute=way)) for way, words in more_recomputed.items()]
    for recompute, also in {layout.recompute: "", **more_recomputed}.items():
        for name in ("context", "tensor", "pipeline"):
            factor = 2
            while layout.data % factor == 0:
                size = getattr(layout, name) * factor
                more = replace(layout, recompute=recompute, data=layout.data // factor, **{name: size})
                tried.append((f"parallel.{name}={size} {also}".rstrip(), more))
                factor *= 2
    for words, candidate in tried:
        parallel = config.parallel.model_copy(
            update={
                "tensor": candidate.tensor,
                "context": candidate.context,
                "pipeline": candidate.pipeline,
                **candidate.recompute.parallel,
            }
        )
        try:
            config.model_copy(update={"parallel": parallel}).check_world_size(machine.gpus)
        except ValueError:
            continue
        if predict(config, candidate, machine, assumptions, vocab_size=vocab_size).fits:
            return words
    return None


def _enough_gpus(
    config: RunConfig, machine: Machine, assumptions: Assumptions, *, vocab_size: int
) -> tuple[int, Prediction] | None:
    gpus = machine.gpus * 2
    while gpus <= MORE_GPUS:
        more = replace(machine, gpus=gpus, gpus_per_node=max(machine.gpus_per_node, min(gpus, 8)))
        most_recomputed = (layout for layout in layouts(config, more) if layout.recompute.attention)
        if any(predict(config, layout, more, assumptions, vocab_size=vocab_size).fits for layout in most_recomputed):
            best, _ = best_layouts(config, more, assumptions, vocab_size=vocab_size, count=1)
            return gpus, best[0]
        gpus *= 2
    return None


def _largest_part(prediction: Prediction) -> str:
    peak = prediction.peak
    parts = {
        name: getattr(peak, name)
        for name in ("weights", "gradients", "optimizer", "activations", "attention", "communication")
    }
    name = max(parts, key=lambda part: parts[part])
    return f"most of it {name}, {parts[name] / GIB:.1f} GiB"

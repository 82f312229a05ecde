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
MLP_TILE = 16384
"""Tokens of a tile whose MLP is tried: long enough for matrix products at full speed."""
MOMENTS = "optimizer.offload_moments=1.0"
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
    frugal = _with_all_memory_settings(config, machine, assumptions, vocab_size=vocab_size)
    if frugal is not None:
        words, prediction = frugal
        host = prediction.peak.host * min(machine.gpus, machine.gpus_per_node)
        return [
            *lines,
            f"These GPUs are enough with {words}: {prediction.peak.total / GIB:.1f} GiB a GPU, and "
            f"{host / GIB:.1f} GiB of host memory a node (docs/memory.md)",
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
    """Trades of time for memory first, then context, tensor and pipeline parallelism in place of data parallelism, each
    doubled until it fits; then both."""
    tried = memory_settings(layout, config.training.sequence_length // layout.context)
    if _can_offload_moments(config):
        words, frugal = tried[-1] if tried else ("", layout)
        with_moments = f"{words} {MOMENTS}".strip()
        tried.append((with_moments, frugal))
    more_recomputed = {way: way.overrides(layout.recompute) for way in more_than(layout.recompute)}
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
                "mlp_tile_tokens": candidate.mlp_tile_tokens,
                "offload_activations": candidate.offload_activations,
                "sequence_parallel": None if candidate.sequence_parallel else False,
            }
        )
        changed = config.model_copy(update={"parallel": parallel})
        of_candidate = _with_moments_on_host(changed) if MOMENTS in words else changed
        if not _is_accepted(of_candidate, gpus=machine.gpus):
            continue
        if predict(of_candidate, candidate, machine, assumptions, vocab_size=vocab_size).fits:
            return words
    return None


def _is_accepted(config: RunConfig, gpus: int | None = None) -> bool:
    """Tell whether a run takes a changed configuration, of which a copy has not been checked; `gpus`: on so many."""
    try:
        checked = RunConfig.model_validate(config.model_dump())
        if gpus is not None:
            checked.check_world_size(gpus)
    except ValueError:
        return False
    return True


def _can_offload_moments(config: RunConfig) -> bool:
    sharded = config.engine == "megatron" and config.parallel.distributed_optimizer
    return sharded and not config.optimizer.offload_moments


def _with_moments_on_host(config: RunConfig) -> RunConfig:
    optimizer = config.optimizer.model_copy(update={"offload_moments": 1.0})
    return config.model_copy(update={"optimizer": optimizer})


def memory_settings(layout: Layout, shard: int) -> list[tuple[str, Layout]]:
    """Return settings that trade time for memory at the same parallel sizes, with the layout that each makes.

    They come in the order of the time that they cost: what keeps the attention's output first.

    Args:
        shard: tokens of a sequence at a rank; tiles that are not shorter change nothing.
    """
    tried = []
    if layout.tensor > layout.sequence_shards:
        tried.append(("parallel.sequence_parallel=true", replace(layout, sequence_parallel=True)))
    for way in (layout.recompute, *more_than(layout.recompute)):
        words = [] if way == layout.recompute else [way.overrides(layout.recompute)]
        frugal = replace(layout, recompute=way)
        if words:
            tried.append((" ".join(words), frugal))
        if not way.whole:
            continue
        if layout.mlp_tile_tokens is None and shard > MLP_TILE:
            words, frugal = [*words, f"parallel.mlp_tile_tokens={MLP_TILE}"], replace(frugal, mlp_tile_tokens=MLP_TILE)
            tried.append((" ".join(words), frugal))
        if layout.offload_activations == 0.0:
            words, frugal = [*words, "parallel.offload_activations=1.0"], replace(frugal, offload_activations=1.0)
            tried.append((" ".join(words), frugal))
    return tried


def _with_all_memory_settings(
    config: RunConfig, machine: Machine, assumptions: Assumptions, *, vocab_size: int
) -> tuple[str, Prediction] | None:
    """Return the fastest layout that fits with every setting that trades time for memory, and its words; moments go to
    the host last."""
    tile = config.parallel.mlp_tile_tokens or MLP_TILE
    update = {"mlp_tile_tokens": tile, "recompute": "full", "offload_activations": 1.0}
    frugal = config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})
    candidates = [("", frugal)]
    if _can_offload_moments(config):
        candidates.append((f" and {MOMENTS}", _with_moments_on_host(frugal)))
    for words, candidate in candidates:
        if not _is_accepted(candidate):
            continue
        best, _ = best_layouts(candidate, machine, assumptions, vocab_size=vocab_size, count=1)
        if best:
            return f"{best[0].layout}{words}", best[0]
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

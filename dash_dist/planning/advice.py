"""Advice where no layout fits, or the configuration's own does not.

Knows which single changes to try; does not know how a prediction is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dash_dist.config.run import RunConfig
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.prediction import Prediction, predict
from dash_dist.planning.recompute import Recompute, more_than
from dash_dist.planning.search import best_layouts, fewest_layers, layouts

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
    """Return the settings of the smallest change that fits; None: no single change does.

    Shards of the residual stream come first, which cost no time. Then comes recomputation, in the way that is fastest
    where it recomputes as few layers as fit; then the other trades of time for memory; then context, tensor and
    pipeline parallelism in place of data parallelism, each doubled until it fits; then both.
    """
    # A run that is out of memory although the plan has some left needs more than the plan's smallest number.
    short = predict(config, layout, machine, assumptions, vocab_size=vocab_size).is_tight

    def fitted(candidate: Layout, changed: RunConfig) -> Prediction | None:
        asked = _with_layout(changed, candidate)
        if not _is_accepted(asked, gpus=machine.gpus):
            return None
        foretell = fewest_layers if short else predict
        found = foretell(asked, candidate, machine, assumptions, vocab_size=vocab_size)
        return found if found.fits and _is_accepted(_with_layout(changed, found.layout), gpus=machine.gpus) else None

    if layout.tensor > layout.sequence_shards:
        split = replace(layout, sequence_parallel=True)
        asked = _with_layout(config, split)
        of_shards = predict(asked, split, machine, assumptions, vocab_size=vocab_size)
        if of_shards.fits and _is_accepted(asked, gpus=machine.gpus):
            return _changes(layout, split)
    shard = config.training.sequence_length // layout.context
    ways = [found for way in recomputed_more(layout) if (found := fitted(way, config)) is not None]
    if ways:
        return _changes(layout, min(ways, key=lambda found: (found.is_tight, found.seconds)).layout)
    frugal = memory_settings(layout, shard)
    for candidate in frugal:
        if (found := fitted(candidate, config)) is not None:
            return _changes(layout, found.layout)
    if _can_offload_moments(config):
        candidate = frugal[-1] if frugal else layout
        if (found := fitted(candidate, _with_moments_on_host(config))) is not None:
            return f"{_changes(layout, found.layout)} {MOMENTS}".strip()
    for candidate in _with_more_ranks(layout):
        if (found := fitted(candidate, config)) is not None:
            return _changes(layout, found.layout)
    return None


def _with_more_ranks(layout: Layout) -> Iterator[Layout]:
    """Layouts with more context, tensor or pipeline parallelism, with the same recomputation and then with more."""
    own = layout.recompute.of_layers(None)
    for recompute in (own, *more_than(own)):
        for name in ("context", "tensor", "pipeline"):
            factor = 2
            while layout.data % factor == 0:
                size = getattr(layout, name) * factor
                yield replace(layout, recompute=recompute, data=layout.data // factor, **{name: size})
                factor *= 2


def _changes(before: Layout, after: Layout) -> str:
    """Settings to add to a command line that asked for `before`."""
    words = [
        f"parallel.{name}={getattr(after, name)}"
        for name in ("context", "tensor", "pipeline")
        if getattr(after, name) != getattr(before, name)
    ]
    words.append(after.recompute.overrides(before.recompute))
    words += [
        f"parallel.{name}={getattr(after, name)}"
        for name in ("mlp_tile_tokens", "offload_activations")
        if getattr(after, name) != getattr(before, name)
    ]
    if after.sequence_parallel and not before.sequence_parallel:
        words.append("parallel.sequence_parallel=true")
    return " ".join(word for word in words if word)


def _with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    parallel = config.parallel.model_copy(
        update={
            "tensor": layout.tensor,
            "context": layout.context,
            "pipeline": layout.pipeline,
            **layout.recompute.parallel,
            "mlp_tile_tokens": layout.mlp_tile_tokens,
            "offload_activations": layout.offload_activations,
            "sequence_parallel": None if layout.sequence_parallel else False,
        }
    )
    return config.model_copy(update={"parallel": parallel})


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


def recomputed_more(layout: Layout) -> list[Layout]:
    """Return layouts that recompute more of their layers, or more layers, but not the attention."""
    ways = [way for way in more_than(layout.recompute) if not way.attention]
    if layout.recompute.layers is not None:
        ways.insert(0, layout.recompute.of_layers(None))
    return [replace(layout, recompute=way) for way in ways]


def memory_settings(layout: Layout, shard: int) -> list[Layout]:
    """Return layouts that trade time for memory at the same parallel sizes by more than `recomputed_more`.

    They come in the order of the time that they cost: what keeps the attention's output first.

    Args:
        shard: tokens of a sequence at a rank; tiles that are not shorter change nothing.
    """
    tried = []
    own = layout.recompute.of_layers(None)
    for way in (own, *more_than(own)):
        if not way.whole:
            continue
        frugal = replace(layout, recompute=way)
        if way.attention and way != own:
            tried.append(frugal)
        if layout.mlp_tile_tokens is None and shard > MLP_TILE:
            frugal = replace(frugal, mlp_tile_tokens=MLP_TILE)
            tried.append(frugal)
        if layout.offload_activations == 0.0:
            frugal = replace(frugal, offload_activations=1.0)
            tried.append(frugal)
    return tried


def _with_all_memory_settings(
    config: RunConfig, machine: Machine, assumptions: Assumptions, *, vocab_size: int
) -> tuple[str, Prediction] | None:
    """Return the fastest layout that fits with every setting that trades time for memory, and its words; moments go to
    the host last."""
    tile = config.parallel.mlp_tile_tokens or MLP_TILE
    update = {"mlp_tile_tokens": tile, **Recompute("full").parallel, "offload_activations": 1.0}
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

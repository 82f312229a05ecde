"""The figures of the report as SVG: one function per kind of figure, and the list of those that a run has.

Knows curves and what they mean; does not know the page around them. Text stays text, and is drawn in the page's own
colour, so that a figure can be read aloud, searched, and seen on a light page as on a dark one.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dash_dist.report.record import Curve, Histogram, RunRecord
from dash_dist.run.curve_names import PARTS

# Told apart on white and on black, and without red and green side by side (after Okabe and Ito, 2008).
COLOURS = ("#3b82c4", "#e08a1e", "#2a9d78", "#c86fa8", "#8a8f98", "#b39b00", "#56a8d8", "#d1602f", "#7a6fd0")
_TEXT = "#010203"  # stands for the colour of the page's text until the SVG is written
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _TEXT
    ),
    "axes.prop_cycle": cycler(color=COLOURS),
}
DASHES = ("-", "--", "-.", ":")  # where one curve lies on another, both are seen
MANY_LAYERS = 10  # beyond, lines are not named one by one


@dataclass(frozen=True)
class Figure:
    """One figure of the page: `name` is its anchor, `description` what a person who cannot see it is told."""

    name: str
    title: str
    meaning: str
    description: str
    svg: str


def figures(record: RunRecord) -> list[Figure]:
    """Those that the run has anything for, in the order of the page."""
    return list(_figures(record))


def _figures(record: RunRecord) -> Iterator[Figure]:
    curves, tokens = record.curves, record.curve("train/tokens")

    def lines(name: str, title: str, meaning: str, unit: str, named: Mapping[str, Curve], **options: bool) -> Figure:
        return _line_figure(name, title, meaning, unit, named, tokens, **options)

    def one(name: str, title: str, meaning: str, unit: str, tag: str, **options: bool) -> Iterator[Figure]:
        if tag in curves:
            yield lines(name, title, meaning, unit, {title: curves[tag]}, **options)

    def several(name: str, title: str, meaning: str, unit: str, prefix: str, **options: bool) -> Iterator[Figure]:
        if named := record.with_prefix(prefix):
            yield lines(name, title, meaning, unit, named, **options)

    yield from one("loss", "Loss", "Mean cross entropy per token.", "nats per token", "train/loss")
    meaning = "Mean cross entropy per token of held-out sequences."
    yield from one("heldout", "Held-out loss", meaning, "nats per token", "heldout/loss")
    if buckets := record.with_prefix("heldout/loss"):
        named = dict(sorted(buckets.items(), key=lambda item: int(item[0].partition("-")[0])))
        meaning = "By position in the sequence, or in the document where documents are separate."
        yield lines("heldout-by-position", "Held-out loss by position", meaning, "nats per token", named)
    yield from one(
        "grad-norm", "Gradient norm", "Of the mean loss, before clipping.", "norm", "train/grad_norm", logarithmic=True
    )
    yield from one("learning-rate", "Learning rate", "Of AdamW.", "learning rate", "train/learning_rate")
    yield from one(
        "speed",
        "Tokens per second and GPU",
        "Padding left out; of processes, where there is no GPU.",
        "tokens/s",
        "perf/tokens_per_second_per_gpu",
        from_zero=True,
    )
    if "perf/mfu" in curves:
        meaning = "Model FLOPs utilisation: share of the GPU's published bf16 peak, attention at the measured density."
        yield from one("mfu", "MFU", meaning, "share of the peak", "perf/mfu", from_zero=True)
    else:
        meaning = (
            "Operations that the model is worth, attention at the measured density; the peak of this device is unknown."
        )
        yield from one(
            "model-flops", "Model TFLOP/s per GPU", meaning, "TFLOP/s", "perf/model_tflops_per_gpu", from_zero=True
        )
    parts = record.with_prefix("time")
    if present := {part: parts[part] for part in PARTS if part in parts}:
        yield _time_figure(present, tokens)
    yield from several(
        "memory", "Memory", "Peaks since the last logged step, of the fullest rank.", "GiB", "memory", from_zero=True
    )
    yield from several(
        "density",
        "Density by layer",
        "Selected / causally available chunks.",
        "share",
        "routing/density",
        from_zero=True,
    )
    histograms = {
        tag.rpartition("_")[2]: histogram
        for tag, histogram in record.histograms.items()
        if tag.startswith("routing/selected_chunks/")
    }
    if histograms:
        yield _distribution_figure(histograms)
    gib = record.with_prefix("cp")
    if named := {
        name: gib[f"{name}_gib"] for name in ("planned", "sent", "dense", "slow_link") if f"{name}_gib" in gib
    }:
        meaning = "Of K, V and their gradients in a step, over all ranks; dense is what an all-gather would have sent."
        yield lines("bytes", "Bytes of the exchange", meaning, "GiB", named, from_zero=True)
    yield from several(
        "coverage",
        "Union coverage by layer",
        "Chunks of other ranks that a rank needed / that it could have needed.",
        "share",
        "cp/coverage",
        from_zero=True,
    )
    yield from one(
        "overlap",
        "Overlap of exchange and attention",
        "Share of the time under way during which ranks had something to compute.",
        "share",
        "cp/overlap",
        from_zero=True,
    )
    used = record.setting("attention", "layout")
    meaning = f"Selected chunks of the busiest rank / of the mean one, for each layout; in use: {used}."
    yield from several("imbalance", "Imbalance over CP ranks", meaning, "largest / mean", "cp/imbalance")


def _line_figure(
    name: str,
    title: str,
    meaning: str,
    unit: str,
    named: Mapping[str, Curve],
    tokens: Curve | None,
    *,
    logarithmic: bool = False,
    from_zero: bool = False,
) -> Figure:
    def draw(axes: Axes) -> None:
        many = len(named) > MANY_LAYERS
        if many:
            axes.set_prop_cycle(color=matplotlib.colormaps["cool"](np.linspace(0, 1, len(named))))
        for (label, curve), dashes in zip(named.items(), itertools.cycle(DASHES)):
            values = np.where(np.isfinite(curve.values), curve.values, np.nan)
            marker = "o" if len(values) == 1 else None
            axes.plot(_tokens_at(curve.steps, tokens), values, label=label.replace("_", " "), marker=marker, ls=dashes)
        if logarithmic and all((curve.values > 0).all() for curve in named.values()):
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        if len(named) > 1:
            handles, labels = axes.get_legend_handles_labels()
            chosen = [0, -1] if many else range(len(handles))
            axes.legend([handles[i] for i in chosen], [labels[i] for i in chosen], ncols=2 if len(handles) > 4 else 1)
        axes.set_ylabel(unit)

    last = ", ".join(f"{label.replace('_', ' ')} {curve.last:.4g}" for label, curve in _few(named))
    first = next(iter(named.values()))
    description = f"{title} in {unit} from step {first.steps[0]} to step {first.steps[-1]}; last: {last}."
    return Figure(name, title, meaning, description, _svg(name, draw, tokens))


def _time_figure(parts: Mapping[str, Curve], tokens: Curve | None) -> Figure:
    steps = max((curve.steps for curve in parts.values()), key=len)

    def draw(axes: Axes) -> None:
        at = _tokens_at(steps, tokens)
        heights = [_at_steps(curve, steps) for curve in parts.values()]
        labels = [part.replace("_", " ") for part in parts]
        if len(steps) == 1:
            bottoms = np.cumsum([np.zeros(1), *heights[:-1]], axis=0)
            for height, bottom, label in zip(heights, bottoms, labels, strict=True):
                axes.bar(at, height, bottom=bottom, width=max(1.0, at[0] / 10), label=label)
        else:
            axes.stackplot(at, *heights, labels=labels, step="mid")
        handles, _ = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))  # as they are stacked
        axes.set_ylabel("seconds of a step")
        axes.set_ylim(bottom=0)

    shares = {part: float(curve.recent.mean()) if len(curve.recent) else 0.0 for part, curve in parts.items()}
    last = ", ".join(f"{part.replace('_', ' ')} {seconds:.3g} s" for part, seconds in shares.items())
    return Figure(
        "time",
        "Time by part",
        "Seconds of a step, mean of the ranks. exchange: waiting for K and V; gradients: their reduction; rest: "
        "waiting for others; save: holding training up, spread over the steps.",
        f"Stacked seconds of a step by part; mean of the last quarter: {last}.",
        _svg("time", draw, tokens),
    )


def _distribution_figure(histograms: Mapping[str, Histogram]) -> Figure:
    layers = sorted(histograms, key=int)
    boxes = [_quantiles(histograms[layer].counts) for layer in layers]

    def draw(axes: Axes) -> None:
        names = ("whislo", "q1", "med", "q3", "whishi")
        statistics = [{**dict(zip(names, box, strict=True)), "fliers": []} for box in boxes]
        line = {"color": _TEXT, "linewidth": 1}
        axes.bxp(
            statistics,
            positions=[int(layer) for layer in layers],
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": COLOURS[0], "edgecolor": _TEXT, "linewidth": 0.8},
            medianprops={"color": COLOURS[1], "linewidth": 2},
            whiskerprops=line,
            capprops=line,
            manage_ticks=False,
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="layer", ylabel="selected chunks")
        axes.set_ylim(bottom=0)

    last = "; ".join(
        f"layer {layer}: {box[2]} of 5 % to 95 % {box[0]} to {box[4]}"
        for layer, box in zip(layers[:4], boxes[:4], strict=True)
    )
    step = max(histogram.step for histogram in histograms.values())
    return Figure(
        "selected-chunks",
        "Selected chunks by layer",
        f"How many chunks a (token, KV head) pair selects, at step {step}: median, middle half, 5 % to 95 %.",
        f"Medians of selected chunks: {last}.",
        _svg("selected-chunks", draw, None),
    )


def _quantiles(counts: np.ndarray) -> list[int]:
    """The numbers at 5, 25, 50, 75 and 95 % of a histogram of the numbers from 0."""
    reached = np.cumsum(counts) / counts.sum()
    return [int(np.searchsorted(reached, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)]


def _tokens_at(steps: np.ndarray, tokens: Curve | None) -> np.ndarray:
    """Tokens seen by the steps; the steps themselves where they are not known."""
    return steps if tokens is None else np.interp(steps, tokens.steps, tokens.values)


def _at_steps(curve: Curve, steps: np.ndarray) -> np.ndarray:
    """Its values at some of its steps, and 0 at the others."""
    values = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    return np.array([values.get(step, 0.0) for step in steps.tolist()])


def _few(named: Mapping[str, Curve]) -> Sequence[tuple[str, Curve]]:
    return list(named.items())[:MANY_LAYERS]


def _svg(name: str, draw: Callable[[Axes], None], tokens: Curve | None) -> str:
    """An <svg> element without a fixed size, its ids begun with the figure's name, its text in the page's colour."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = MatplotlibFigure(figsize=(6.4, 3.1), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.set_xlabel("step" if tokens is None else "tokens seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)

"""Pictures of the results: one for each part. Runs without a GPU; needs matplotlib.

Knows what is compared; does not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tools.study.results import Record
from tools.study.summary import Estimate, MethodResults, PartResults, accuracy, by_part, held_out_loss, last_density
from tools.study.tasks import TASKS

Point = tuple[float, Estimate | None]

_SHARES = -0.02, 1.02
"""Limits of the axis of accuracies."""


def plot_parts(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Draw every part that has results into `folder`; returns the files."""
    return [_plot(folder / f"{part.name}.png", part) for part in by_part(records)]


def _plot(path: Path, part: PartResults) -> Path:
    panels = (_by_difficulty, _by_length, _by_density) if part.of_task else (_loss_by_position, _loss_by_density)
    figure, places = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), layout="constrained")
    for panel, axes in zip(panels, places, strict=True):
        panel(axes, part)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    places[0].legend(fontsize=7)
    environments = [record["environment"] for method in part.methods for record in method.records]
    gpus = ", ".join(dict.fromkeys(one["gpu"] for one in environments))
    seeds = max(len(method.records) for method in part.methods)
    figure.suptitle(f"{part.name}: {gpus}, up to {seeds} seeds, bars of one standard deviation", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _by_difficulty(axes: Axes, part: PartResults) -> None:
    task = TASKS[part.corpus]
    for method in part.methods:
        points = [(one, method.of_test(part.trained_length, {}, accuracy(one))) for one in part.difficulties]
        _line(axes, method, points)
    axes.plot(part.difficulties, [task.chance(one) for one in part.difficulties], ":", color="grey", label="chance")
    _powers(axes, part.difficulties)
    axes.set_xlabel(task.measure)
    axes.set_ylabel(f"accuracy at {part.trained_length:,} tokens")
    axes.set_ylim(*_SHARES)


def _by_length(axes: Axes, part: PartResults) -> None:
    for method in part.methods:
        _line(axes, method, [(one, method.of_test(one, {}, accuracy())) for one in part.lengths])
    axes.axvline(part.trained_length, color="grey", linestyle=":")
    _powers(axes, part.lengths)
    axes.set_xlabel("tokens of the text; longest trained one dotted")
    axes.set_ylabel("accuracy")
    axes.set_ylim(*_SHARES)


def _by_density(axes: Axes, part: PartResults) -> None:
    """Draw the trained settings as points, and lines through the other settings of the same models."""
    length = part.trained_length
    for method in part.methods:
        found = [
            (density.mean, method.of_test(length, dial, accuracy()))
            for dial in [{}, *method.dials]
            if (density := method.of_test(length, dial, lambda score: float(score["density"]))) is not None
        ]
        _line(axes, method, sorted(found, key=lambda point: point[0]), alpha=0.5)
        axes.plot(*_means(found[:1]), "o", color=axes.lines[-1].get_color(), markersize=9)
    axes.set_xscale("log")
    axes.set_xlabel("density; large points as trained")
    axes.set_ylabel(f"accuracy at {length:,} tokens")
    axes.set_ylim(*_SHARES)


def _loss_by_position(axes: Axes, part: PartResults) -> None:
    tags = [tag for tag in part.methods[0].records[0]["training"]["heldout"] if "-" in tag]
    tags.sort(key=lambda tag: int(tag.rpartition("-")[2]))
    for method in part.methods:
        points = [(float(tag.rpartition("-")[2]), method.of_training(held_out_loss(tag))) for tag in tags]
        _line(axes, method, points)
    _powers(axes, [int(tag.rpartition("-")[2]) for tag in tags])
    axes.set_xlabel("end of the positions")
    axes.set_ylabel("held-out loss, nats per byte")


def _loss_by_density(axes: Axes, part: PartResults) -> None:
    for method in part.methods:
        density = method.of_training(last_density)
        loss = method.of_training(held_out_loss("heldout/loss"))
        _line(axes, method, [(1.0 if density is None else density.mean, loss)])
    axes.set_xscale("log")
    axes.set_xlabel("density at the end of the training")
    axes.set_ylabel("held-out loss, nats per byte")


def _line(axes: Axes, method: MethodResults, points: Sequence[Point], alpha: float = 1.0) -> None:
    places, means = _means(points)
    spreads = [estimate.spread or 0.0 for _, estimate in points if estimate is not None]
    axes.errorbar(places, means, yerr=spreads, marker=".", capsize=2, alpha=alpha, label=method.method)


def _means(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    known = [(place, estimate.mean) for place, estimate in points if estimate is not None]
    return [place for place, _ in known], [mean for _, mean in known]


def _powers(axes: Axes, places: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(places), [f"{one // 1024}K" if one % 1024 == 0 else str(one) for one in places], fontsize=8)
    axes.minorticks_off()

"""The picture of an evaluation's results: accuracy by length and by density, and by depth.

Knows groups; does not know files of results. Needs matplotlib.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dash_dist.evaluation.groups import DEPTH_BINS, Group, accuracy_by_depth
from dash_dist.evaluation.table import rows_of

_DASHES = ("-", "--", "-.", ":")  # where one curve lies on another, both are seen


def plot(path: Path, groups: Sequence[Group]) -> None:
    """Write the picture, in the format that the name ends with. Raises OSError, ValueError."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_length, by_density, by_depth = figure.subplots(1, 3)
    scales = list(dict.fromkeys(group.routing_scale for group in groups))
    for scale, dashes in zip(scales, itertools.cycle(_DASHES)):
        own = [group for group in groups if group.routing_scale == scale]
        rows = {length: of_row for (length, _), of_row in sorted(rows_of(own).items(), key=lambda row: row[0][0])}
        label = "dense" if scale is None else f"routing scale {scale:g}"
        accuracies = [fmean(group.accuracy for group in of_row) for of_row in rows.values()]
        by_length.plot(list(rows), accuracies, marker="o", linestyle=dashes, label=label)
        densities = [fmean(group.density for group in of_row) for of_row in rows.values()]
        by_density.plot(densities, accuracies, marker="o", linestyle=dashes)
        for density, accuracy, length in zip(densities, accuracies, rows, strict=True):
            by_density.annotate(_short(length), (density, accuracy), textcoords="offset points", xytext=(4, 4))
        depths = accuracy_by_depth(sample for group in own for sample in group.samples)
        middles = [(number + 0.5) / DEPTH_BINS for number in depths]
        by_depth.plot(middles, list(depths.values()), marker="o", linestyle=dashes)
    lengths = sorted({group.length for group in groups})
    by_length.set_xscale("log", base=2)
    by_length.set_xticks(lengths, [_short(length) for length in lengths])
    by_length.set_xlabel("tokens")
    by_density.set_xscale("log")
    by_density.set_xlabel("density: selected / available chunks")
    by_depth.set_xlim(0, 1)
    by_depth.set_xlabel("depth of the answer in the text")
    for axes in (by_length, by_density, by_depth):
        axes.set_ylim(-0.04, 1.08)
        axes.set_ylabel("accuracy, mean over the tasks")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    by_length.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _short(length: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)

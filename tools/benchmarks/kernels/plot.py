"""The picture of a results file: speed-up over cuDNN against the ideal, and where the time goes. Runs without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tools.benchmarks.kernels.results import CUDNN_FORWARD, CUDNN_STEP, FORWARD, STEP, Row

NAMED_KERNELS = 8  # with a colour of their own; the rest is one bar part
NAME_LENGTH = 44
OTHER = "other kernels"


def plot(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """Writes the PNG; rows without dense times are left out of the first panel, rows without kernels of the second."""
    compared = [row for row in rows if row.speed_up(FORWARD, CUDNN_FORWARD) is not None]
    profiled = [row for row in rows if row.kernels]
    height = 2.2 + 0.75 * max(len(compared), len(profiled), 2)
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, height), layout="constrained")
    _plot_speed_ups(left, compared)
    _plot_kernels(right, profiled)
    versions = f"PyTorch {environment['torch']}, Triton {environment['triton']}, commit {environment['commit'][:12]}"
    figure.suptitle(f"{environment['gpu']}, {versions}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_speed_ups(axes: Axes, rows: list[Row]) -> None:
    columns = (("forward", FORWARD, CUDNN_FORWARD, "#4c78a8"), ("forward + backward", STEP, CUDNN_STEP, "#f58518"))
    for offset, (name, ours, dense, colour) in zip((-0.2, 0.2), columns, strict=True):
        found = [
            (place + offset, speed_up) for place, row in enumerate(rows) if (speed_up := row.speed_up(ours, dense))
        ]
        if not found:
            continue
        bars = axes.barh([place for place, _ in found], [value for _, value in found], 0.38, label=name, color=colour)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    for place, row in enumerate(rows):
        assert row.density is not None
        line = axes.vlines(1 / row.density, place - 0.42, place + 0.42, colors="black", linewidth=2)
        if place == 0:
            line.set_label("ideal, 1 / density")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times faster than dense cuDNN")
    _name_rows(axes, rows)


def _plot_kernels(axes: Axes, rows: list[Row]) -> None:
    longest: dict[str, float] = {}
    for row in rows:
        total = sum(row.kernels.values())
        for name, milliseconds in row.kernels.items():
            longest[name] = max(longest.get(name, 0.0), milliseconds / total)
    named = sorted(longest, key=lambda name: -longest[name])[:NAMED_KERNELS]
    colours = [*(f"C{place}" for place in range(NAMED_KERNELS)), "lightgrey"]
    starts = [0.0] * len(rows)
    for name, colour in zip([*named, OTHER], [*colours[: len(named)], colours[-1]], strict=True):
        shares = []
        for row in rows:
            milliseconds = sum(row.kernels.values()) - sum(row.kernels.get(known, 0.0) for known in named)
            shares.append((milliseconds if name == OTHER else row.kernels.get(name, 0.0)) / sum(row.kernels.values()))
        bars = axes.barh(range(len(rows)), shares, 0.6, left=starts, label=name[:NAME_LENGTH], color=colour)
        axes.bar_label(
            bars, [f"{share:.0%}" if share >= 0.05 else "" for share in shares], label_type="center", fontsize=8
        )
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    for place, row in enumerate(rows):
        axes.text(1.01, place, f"{sum(row.kernels.values()):.1f} ms", va="center", fontsize=9)
    axes.set_xlim(0, 1.12)
    passes = "forward + backward" if any(STEP in row.columns for row in rows) else "forward"
    axes.set_xlabel(f"share of the kernels' time, {passes}")
    _name_rows(axes, rows)


def _name_rows(axes: Axes, rows: list[Row]) -> None:
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)

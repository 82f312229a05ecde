"""The picture of a results file: tokens per second against the sequence length. Runs without a GPU."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tools.benchmarks.context_parallel.results import ExchangeRow, Results


def plot(path: Path, results: Results) -> None:
    """Writes the PNG: a panel per pair of head counts and density asked for, a line per exchange and dense peer."""
    panels: dict[tuple[int, int, float], list[ExchangeRow]] = {}
    for row in results.exchanges:
        panels.setdefault((row.case.query_heads, row.case.kv_heads, row.case.asked_density), []).append(row)
    if not panels:
        raise SystemExit("nothing to draw: the file has no rows of the part 'exchanges'")
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), layout="constrained", squeeze=False)
    for ((query_heads, kv_heads, density), rows), place in zip(panels.items(), axes[0], strict=True):
        _plot_panel(place, rows)
        place.set_title(f"({query_heads}, {kv_heads}) heads, density {density:g}", fontsize=10)
    environment = results.environment
    versions = f"PyTorch {environment['torch']}, Triton {environment['triton']}, commit {environment['commit'][:12]}"
    figure.suptitle(f"{environment['ranks']} x {environment['gpu']}, {versions}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_panel(axes: Axes, rows: list[ExchangeRow]) -> None:
    rows = sorted(rows, key=lambda row: row.case.seq_len)
    dense = {name for row in rows for name in row.dense}
    for name in dict.fromkeys(name for row in rows for name in row.columns):
        points = [(row.case.seq_len, rate) for row in rows if (rate := row.tokens_per_second(name)) is not None]
        if points:
            line = "--" if name in dense else "-"
            axes.plot([x for x, _ in points], [y for _, y in points], line, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([row.case.seq_len for row in rows], [f"{row.case.seq_len // 1024}K" for row in rows])
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("tokens per second, forward + backward, all GPUs")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=8)

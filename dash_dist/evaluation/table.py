"""The table of an evaluation's results.

Knows groups; does not know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from dash_dist.evaluation.groups import Group


def table_of(groups: Sequence[Group]) -> Table:
    """Accuracy by length, routing scale and task; the density is the mean over the tasks."""
    tasks = list(dict.fromkeys(group.task for group in groups))
    with_scales = any(group.routing_scale is not None for group in groups)
    table = Table(box=None, pad_edge=False)
    for name in ("length", *(["scale"] if with_scales else []), "density", *tasks, "mean"):
        table.add_column(name, justify="right")
    for (length, scale), of_row in rows_of(groups).items():
        accuracy = {group.task: group.accuracy for group in of_row}
        cells = [f"{length:,}", *([f"{scale:g}"] if with_scales else []), f"{fmean(g.density for g in of_row):.3f}"]
        cells += [f"{accuracy[task]:.2f}" if task in accuracy else "" for task in tasks]
        table.add_row(*cells, f"{fmean(accuracy.values()):.2f}")
    return table


def rows_of(groups: Sequence[Group]) -> dict[tuple[int, float | None], list[Group]]:
    """Group the groups by length and routing scale, in their order."""
    rows: dict[tuple[int, float | None], list[Group]] = {}
    for group in groups:
        rows.setdefault((group.length, group.routing_scale), []).append(group)
    return rows

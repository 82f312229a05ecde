"""The results of the extension as a document.

Knows the record; does not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from tools.benchmarks.common.markdown import number, table

_TITLES = {
    "base": "dense, before the extension",
    "unchanged": "its weights at the last length, not trained further",
    "dense": "dense, extended",
    "dash": "DashAttention, extended",
    "dash_first_chunk": "DashAttention with the first chunk, extended",
}


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return tables of losses by position, retrieval and speed, with the command and the machine."""
    runs = record["runs"]
    software = f"torch {record['torch']}, triton {record['triton']}"
    parts = [f"`{record['command']}` at {record['commit']}, {record['gpu']}, {software}"]
    if runs:
        parts += [_losses(runs), _retrieval(runs), _speed(runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _losses(runs: Mapping[str, Any]) -> str:
    tags = sorted({tag for run in runs.values() for tag in run["heldout"]}, key=_end_of_bucket)
    rows = [
        [_TITLES[name], *(number(run["heldout"].get(tag, [0, None])[1], 4) for tag in tags)]
        for name, run in runs.items()
    ]
    header = ["attention", *(tag.removeprefix("heldout/loss").strip("/") or "all positions" for tag in tags)]
    return table("Loss on held-out packages, nats per token, by position", header, rows)


def _end_of_bucket(tag: str) -> int:
    return int(tag.rpartition("-")[2]) if "-" in tag else 0


def _retrieval(runs: Mapping[str, Any]) -> str:
    groups = {name: run["retrieval"] for name, run in runs.items() if "retrieval" in run}
    if not groups:
        return ""
    lengths = sorted({group["length"] for found in groups.values() for group in found})
    tasks = list(dict.fromkeys(group["task"] for found in groups.values() for group in found))
    rows: list[Sequence[str]] = []
    for name, found in groups.items():
        for task in tasks:
            of_task = {group["length"]: group for group in found if group["task"] == task}
            cells = [number(of_task[length]["accuracy"], 2) if length in of_task else "-" for length in lengths]
            rows.append([_TITLES[name], task, *cells])
        densities = {
            length: [group["density"] for group in found if group["length"] == length and group["density"] is not None]
            for length in lengths
        }
        rows.append([_TITLES[name], "density", *(number(fmean(of) if of else None, 3) for of in densities.values())])
    return table("Retrieval: accuracy by length, and density", ["attention", "task", *map(str, lengths)], rows)


def _speed(runs: Mapping[str, Any]) -> str:
    rows = []
    for name, run in runs.items():
        speeds = list(run["tokens_per_second"].values())
        density = list(run["density"].get("routing/mean_density", {}).values())
        rows.append(
            [
                _TITLES[name],
                f"{run['tokens']:,}",
                number(run["last_loss"], 4),
                f"{median(speeds[-3:]):,.0f}" if speeds else "-",
                number(density[0] if density else None, 3),
                number(density[-1] if density else None, 3),
            ]
        )
    header = ["attention", "tokens", "last loss", "tokens/s at the end", "density, first step", "density, last step"]
    return table("Training", header, rows)

"""Results of the engines benchmark as a table."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table

_HEADER = ("run", "GPUs", "first loss", "last loss", "furthest", "s a step", "tokens/s a GPU", "GiB", "GiB planned")
_OF_SAVES = ("run", "pause, s", "s a step before", "s a step while it writes")
_LEGEND = "furthest: largest difference of a step's loss from that of one GPU, in nats."


def as_markdown(record: dict[str, Any]) -> str:
    """Environment, one row for each run, what saves cost, and runs that failed."""
    first = record["rows"][0]["losses"] if record["rows"] else []
    rows = [_cells(row, first) for row in record["rows"]]
    title = f"One {record['shape']} model, two sequences of {record['tokens']:,} tokens a step"
    lines = [*provenance(record), "", table(title, _HEADER, rows), "", _LEGEND]
    if saving := [row for row in record["rows"] if "save_pause_seconds" in row]:
        lines += ["", table("Saves in the background", _OF_SAVES, [_save_cells(row) for row in saving])]
    lines += ["", *(f"Failed: {name}: {reason}" for name, reason in record["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict[str, Any], expected: list[float]) -> list[str]:
    furthest = max(abs(loss - other) for loss, other in zip(row["losses"], expected, strict=True))
    return [
        row["name"],
        str(row["gpus"]),
        number(row["losses"][0], 4),
        number(row["losses"][-1], 4),
        number(furthest, 4),
        number(row["step_seconds"], 3),
        number(row["tokens_per_second_per_gpu"], 0),
        number(row["allocated_gib"], 1),
        number(row["planned_gib"], 1),
    ]


def _save_cells(row: dict[str, Any]) -> list[str]:
    names = ("save_pause_seconds", "step_seconds_before_save", "step_seconds_while_saving")
    return [row["name"], *(number(row[name], 3) for name in names)]

"""Results of the step benchmark as a table."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table

_HEADER = (
    "run",
    "GPUs",
    "T",
    "density",
    "s a step",
    "tokens/s a GPU",
    "x transformers",
    "GiB",
    "floor",
    "rest",
)
_PRODUCTS = ("matrix products", "output layer: products")
_LEGEND = (
    "floor: share of the step that its matrix products take at 700 TFLOP/s and its attention as measured. "
    "rest: share that is neither.",
)


def as_markdown(record: dict[str, Any]) -> str:
    """Environment, one row for each run, and runs that failed."""
    lines = [*provenance(record), ""]
    peers = {(row["shape"], row["tokens"]): row["tokens_per_second"] for row in record["rows"] if row["is_peer"]}
    rows = [_cells(row, peers.get((row["shape"], row["tokens"]))) for row in record["rows"]]
    lines.append(table("Whole training steps, bf16, vocabulary 128,256", _HEADER, rows))
    lines += ["", *_LEGEND]
    if profiled := [row for row in record["rows"] if "parts" in row]:
        lines += ["", _table_of_parts(profiled)]
    if peers:
        lines += [
            "",
            "transformers trains with weights, gradients and moments in bfloat16: its memory is not comparable.",
        ]
    lines += ["", *(f"Failed: {name}: {reason}" for name, reason in record["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict[str, Any], peer: float | None) -> list[str]:
    parts = row.get("parts", {})
    attention = sum(seconds for title, seconds in parts.items() if title.startswith("attention"))
    products = sum(parts.get(title, 0.0) for title in _PRODUCTS)
    floor = f"{100 * (row['floor_seconds'] + attention) / row['step_seconds']:.0f} %" if parts else "-"
    rest = f"{100 * (1 - (attention + products) / row['profiled_seconds']):.0f} %" if parts else "-"
    return [
        f"{row['shape']}: {row['name']}",
        str(row["gpus"]),
        str(row["tokens"]),
        number(row["density"], 3),
        number(row["step_seconds"], 3),
        number(row["tokens_per_second"], 0),
        number(row["tokens_per_second"] / peer if peer else None, 2),
        number(row["allocated_gib"], 1),
        floor,
        rest,
    ]


def _table_of_parts(rows: list[dict[str, Any]]) -> str:
    titles = list(dict.fromkeys(title for row in rows for title in row["parts"]))
    cells = [[title, *(_milliseconds(row["parts"].get(title)) for row in rows)] for title in titles]
    cells.append(["step", *(_milliseconds(row["profiled_seconds"]) for row in rows)])
    names = [f"{row['shape']}: {row['name']}" for row in rows]
    return table("Milliseconds of a step under the profiler, by part", ("part", *names), cells)


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e3, 1)

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
    "products at the floor",
)


def as_markdown(record: dict[str, Any]) -> str:
    """Environment, one row for each run, and runs that failed."""
    lines = [*provenance(record), ""]
    peers = {(row["shape"], row["tokens"]): row["tokens_per_second"] for row in record["rows"] if row["is_peer"]}
    rows = [_cells(row, peers.get((row["shape"], row["tokens"]))) for row in record["rows"]]
    lines.append(table("Whole training steps, bf16, vocabulary 128,256", _HEADER, rows))
    if peers:
        lines += [
            "",
            "transformers trains with weights, gradients and moments in bfloat16: its memory is not comparable.",
        ]
    lines += ["", *(f"Failed: {name}: {reason}" for name, reason in record["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict[str, Any], peer: float | None) -> list[str]:
    return [
        f"{row['shape']}: {row['name']}",
        str(row["gpus"]),
        str(row["tokens"]),
        number(row["density"], 3),
        number(row["step_seconds"], 3),
        number(row["tokens_per_second"], 0),
        number(row["tokens_per_second"] / peer if peer else None, 2),
        number(row["allocated_gib"], 1),
        f"{100 * row['floor_seconds'] / row['step_seconds']:.0f} %",
    ]

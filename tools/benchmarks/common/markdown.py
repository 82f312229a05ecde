"""Tables in markdown, with columns that line up in a terminal as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line with the title, then the table; every row has as many cells as the header."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    padded.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"{title}:", *padded])


def provenance(record: Mapping[str, Any]) -> list[str]:
    """Return the lines that say where results come from, of what `describe_environment` recorded."""
    return [
        f"{record['gpu']}, torch {record['torch']}, triton {record['triton']}, commit {record['commit']}.",
        f"Command: `{record['command']}`",
    ]


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

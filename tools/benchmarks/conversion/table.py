"""The results of the conversion as a document.

Knows the record; does not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table


def as_markdown(record: Mapping[str, Any]) -> str:
    """Return tables of the weights as they are, and of each way before its first step and after its last one."""
    parts = ["\n".join(provenance(record["machine"]))]
    unchanged = [(_settings(one), one) for one in record["unchanged"]]
    if unchanged:
        parts.append(_table("Weights as they are", unchanged))
    for title, moment in (("Before the first step", "before"), ("After the last step", "after")):
        rows = [(name, curve[moment]) for name, curve in record["ways"].items()]
        if rows:
            parts.append(_table(title, rows))
    return "\n\n".join(parts) + "\n"


def _settings(one: Mapping[str, Any]) -> str:
    if one["kind"] != "dash":
        return "dense" if one["kind"] == "dense" else f"{one['kind']}, {one['top_chunks']} chunks"
    sigma = "none" if one["prior_sigma"] is None else f"{one['prior_sigma']:g}"
    first = ", first chunk attended" if one.get("attend_first_chunk") else ""  # not in results of before the option
    return f"routing_scale {one['routing_scale']:g}, prior_sigma {sigma}{first}"


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    parts = len(rows[0][1]["by_position"])
    asked = list(rows[0][1]["right"])
    header = ["attention", "held-out loss", *(f"part {part} of {parts}" for part in range(1, parts + 1)), "density"]
    cells = [
        [
            name,
            number(one["heldout"], 3),
            *(number(loss, 3) for loss in one["by_position"]),
            number(one["density"], 3),
            *(number(one["right"][question], 2) for question in asked),
        ]
        for name, one in rows
    ]
    return table(title, [*header, *asked], cells)

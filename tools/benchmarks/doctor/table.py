"""Results of the doctor's benchmark as a table."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table

_HEADER = ("fault", "made by", "expected", "found", "s")
_LEGEND = (
    "found: the expected finding is there with advice, and was not there undisturbed. "
    "The goal is two minutes a call, and no failure undisturbed."
)


def as_markdown(record: dict[str, Any]) -> str:
    """Environment, one row for each case, and every failure and warning with its remedy."""
    title = f"`dash-dist doctor`, {record['gpus']} GPUs"
    rows = [_cells(row) for row in record["rows"]]
    lines = [*provenance(record), "", table(title, _HEADER, rows), "", _LEGEND]
    lines += ["", *(f"Skipped: {row['name']}: {row['skipped']}" for row in record["rows"] if "skipped" in row)]
    for row in record["rows"]:
        if "skipped" in row:
            continue
        lines += ["", f"**{row['name']}**", ""]
        lines += [_line(one) for one in row["findings"] if one["status"] in ("failure", "warning")] or ["- none"]
        lines += [f"- error: {row['error']}"] if row["error"] else []
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [row["name"], "-", "-", "skipped", "-"]
    if "healthy" in row:
        expected, verdict = "no failure", "none" if row["healthy"] else "FAILURE"
    else:
        expected, verdict = f"{row['status']} {row['check']}", "yes" if row["found"] else "NO"
    return [row["name"], row["made_by"], expected, verdict, number(row["seconds"], 0)]


def _line(finding: dict[str, Any]) -> str:
    text = " ".join(finding["text"].split())
    return f"- {finding['status']} {finding['name']}: {text}. Remedy: {finding['advice']}"

"""Results of the telemetry benchmark as tables."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table

_HEADER = ("curve", "TensorBoard", "profile", "difference", "within 3 %")
_LEGEND = (
    "Means over the profiled steps. Not judged are parts below 1 % of a step, and the rest that all others leave. "
    "The operations of a step come from one formula on both sides, so that MFU and TFLOP/s test times and tokens."
)
_COST = (
    "Medians of steps of one run. The steps before and after a logged one trade the end of an update; "
    "with an interval above 1 all three count. Goal: at most 1 % of a step."
)


def as_markdown(record: dict[str, Any]) -> str:
    """Environment, the curves beside the profile, and the cost of logging."""
    title = f"One {record['shape']} model on {record['tokens']:,} tokens a step"
    lines = [*provenance(record), "", table(title, _HEADER, [_cells(row) for row in record["rows"]]), "", _LEGEND]
    cost = record["cost"]
    kinds = [
        [kind, str(cost["steps"][kind]), number(seconds * 1e3, 2)] for kind, seconds in cost["median_seconds"].items()
    ]
    lines += ["", table("Steps by what they record", ("step", "count", "ms"), kinds), "", _COST, ""]
    for title, key in (("at every step", "cost_every_step"), ("with the default intervals", "cost_by_default")):
        lines.append(f"- Logging {title} costs {100 * cost[key]:.2f} % of a step.")
    if not record["heat_maps"]:
        lines.append("- No heat map was drawn: Matplotlib is not installed.")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    difference = "-" if row["difference"] is None else f"{100 * row['difference']:+.2f} %"
    verdict = {True: "yes", False: "NO", None: "not judged"}[row["within"]]
    return [row["curve"], number(row["telemetry"], 4), number(row["profile"], 4), difference, verdict]

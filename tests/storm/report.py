"""Result of a storm as a table and as JSON.

Knows the fields of a result; does not know how they were measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tests.storm.storm import Result


@dataclass(frozen=True)
class Recovery:
    """Seconds from the faults of one kind to the next step, as `Outcome.recovery_seconds` defines it."""

    count: int
    median_seconds: float
    largest_seconds: float


def table(result: Result) -> str:
    """Return a Markdown table of the faults with a summary."""
    lines = [
        "| # | fault | at step | what was done | event | steps lost | seconds to recover |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result.outcomes:
        lost = "" if one.resumed_at is None else str(one.lost_steps)
        cells = (one.number, one.kind, one.step, one.what, one.event, lost, f"{one.recovery_seconds:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| fault | count | median seconds to recover | largest |", "|---|---|---|---|"]
    for kind, one in recovery_by_kind(result).items():
        lines.append(f"| {kind} | {one.count} | {one.median_seconds:.1f} | {one.largest_seconds:.1f} |")
    lost_steps = sum(one.lost_steps for one in result.outcomes)
    events = ", ".join(f"{kind} {count}" for kind, count in sorted(result.events.items()))
    return "\n".join(
        [
            *lines,
            "",
            f"{len(result.outcomes)} faults (seed {result.seed}), {result.workers} ranks on "
            f"{f'{result.gpus} GPUs' if result.gpus else 'CPUs'}, {result.steps} steps, "
            f"{result.storm_seconds:.0f} s. {lost_steps} steps were done again; a checkpoint every {result.interval}.",
            f"Events: {events}.",
            f"All {result.losses.compared} losses and all {result.weights.compared} tensors of the last checkpoint are "
            f"those of the undisturbed run, bit for bit.",
        ]
    )


def recovery_by_kind(result: Result) -> dict[str, Recovery]:
    """Return kind of fault -> time to recover, in alphabetical order."""
    seconds: dict[str, list[float]] = {}
    for one in sorted(result.outcomes, key=lambda one: one.kind):
        seconds.setdefault(one.kind, []).append(one.recovery_seconds)
    return {kind: Recovery(len(of_kind), median(of_kind), max(of_kind)) for kind, of_kind in seconds.items()}


def write_json(result: Result, path: Path) -> None:
    recovery = {kind: asdict(one) for kind, one in recovery_by_kind(result).items()}
    path.write_text(json.dumps({**asdict(result), "recovery_by_kind": recovery}, indent=1) + "\n")

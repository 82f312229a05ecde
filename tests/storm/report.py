"""Result of a storm as a table and as JSON.

Knows the fields of a result; does not know how they were measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tests.storm.storm import Result


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
    lost_steps = sum(one.lost_steps for one in result.outcomes)
    events = ", ".join(f"{kind} {count}" for kind, count in sorted(result.events.items()))
    return "\n".join(
        [
            *lines,
            "",
            f"{len(result.outcomes)} faults (seed {result.seed}), {result.workers} ranks, {result.steps} steps, "
            f"{result.storm_seconds:.0f} s. {lost_steps} steps were done again; a checkpoint every {result.interval}.",
            f"Events: {events}.",
            f"All {result.losses.compared} losses and all {result.weights.compared} tensors of the last checkpoint are "
            f"those of the undisturbed run, bit for bit.",
        ]
    )


def write_json(result: Result, path: Path) -> None:
    path.write_text(json.dumps(asdict(result), indent=1) + "\n")

"""Findings of `dash-dist doctor` on this machine as it is, and under faults made on purpose.

    python -m tools.benchmarks.doctor --out docs/results/doctor_2xh200.json

Every case is a `dash-dist doctor` of its own. Knows calls and results; does not know how a fault is made. The exit
status is 1 if a fault was missed, if the machine as it is has a failure, or if a call took over two minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tools.benchmarks.common.environment import ROOT, describe_environment
from tools.benchmarks.doctor.faults import Fault, faults, found, held_memory
from tools.benchmarks.doctor.table import as_markdown

GOAL_SECONDS = 120.0
UNDISTURBED = Fault("undisturbed", check="", status="")


def main(
    out: Annotated[Path, typer.Option(help="Results as JSON, with a table beside it as .md.")],
    only: Annotated[list[str] | None, typer.Option(help="Name of a fault; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Time limit of a case.")] = 300.0,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Run the undisturbed case and then each fault; results are written after each."""
    gpus = torch.cuda.device_count()
    known = faults(gpus)
    names = [fault.name for fault in known]
    if unknown := sorted(set(only or ()) - {*names}):
        raise typer.BadParameter(f"no fault is named {', '.join(unknown)}: there are {', '.join(names)}")
    device = "cuda" if gpus else "cpu"
    record = describe_environment("tools.benchmarks.doctor", sys.argv[1:], commit=commit, device=device)
    record |= {"gpus": gpus, "rows": []}
    before: list[dict[str, Any]] = []
    for fault in (UNDISTURBED, *known):
        if only and fault is not UNDISTURBED and fault.name not in only:
            continue
        row: dict[str, Any] = {"name": fault.name, "skipped": fault.skipped} if fault.skipped else _run(fault, seconds)
        if fault is UNDISTURBED:
            before = row["findings"]
        elif not fault.skipped:
            row["found"] = found(fault, row["findings"], before)
        record["rows"].append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "findings"}), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        out.with_suffix(".md").write_text(as_markdown(record))
    if not all(_as_it_should_be(row) for row in record["rows"]):
        raise typer.Exit(1)


def _as_it_should_be(row: dict[str, Any]) -> bool:
    return row.get("found", True) and row.get("healthy", True) and row.get("seconds", 0.0) <= GOAL_SECONDS


def _run(fault: Fault, seconds: float) -> dict[str, Any]:
    """Call the doctor once. A call without a report is a row with its error, and without findings."""
    with tempfile.TemporaryDirectory() as folder:
        runs, report = Path(folder, "runs"), Path(folder, "report.json")
        runs.mkdir()
        doctor = [sys.executable, "-m", "dash_dist.cli", "doctor", "--directory", str(runs), "--json", str(report)]
        row: dict[str, Any] = {"name": fault.name, "made_by": fault.made_by, "findings": [], "error": ""}
        if fault is not UNDISTURBED:
            row |= {"check": fault.check, "status": fault.status}
        environment = os.environ | {"DOCTOR_DIRECTORY": str(runs)}
        begin = time.perf_counter()
        try:
            with held_memory(fault):
                begin = time.perf_counter()
                done = subprocess.run(
                    fault.command(doctor), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
                )
            if not report.exists():
                row["error"] = f"exit status {done.returncode}, no report: {(done.stderr or done.stdout)[-1000:]}"
        except (subprocess.SubprocessError, RuntimeError) as error:
            row["error"] = str(error)
        row["seconds"] = time.perf_counter() - begin
        if report.exists():
            row["findings"] = json.loads(report.read_text())["findings"]
    if fault is UNDISTURBED:
        row["healthy"] = not row["error"] and all(one["status"] != "failure" for one in row["findings"])
    return row


if __name__ == "__main__":
    typer.run(main)

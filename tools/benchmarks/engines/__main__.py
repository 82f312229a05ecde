"""Losses, speed, memory and pauses for saves of one model at every layout and engine of up to two GPUs.

    python -m tools.benchmarks.engines --out docs/results/engines_2xh200.json

Every case is a `dash-dist train` of its own. Knows runs and results; does not know settings.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dash_dist.planning import GPUS, Assumptions
from dash_dist.planning.calibration import GIB, predict_measured
from dash_dist.planning.measurements import Measurement, measure_run
from dash_dist.run.curves import read_curves
from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.common.launch import run_command
from tools.benchmarks.engines.cases import CASES, SAVES_EVERY, Case, write
from tools.benchmarks.engines.table import as_markdown


def main(
    out: Annotated[Path, typer.Option(help="Results as JSON, with a table beside it as .md.")],
    tokens: Annotated[int, typer.Option(help="Sequence length.")] = 32_768,
    only: Annotated[list[str] | None, typer.Option(help="Name of a case; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Time limit of a case.")] = 120.0,
    shape: Annotated[str, typer.Option(help="1b, 8b, or tiny to try the program out on CPUs.")] = "1b",
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Run the cases that fit this machine one after another; results are written after each."""
    names = [case.name for case in CASES]
    if unknown := sorted(set(only or ()) - {*names}):
        raise typer.BadParameter(f"no case is named {', '.join(unknown)}: there are {', '.join(names)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    record = describe_environment("tools.benchmarks.engines", sys.argv[1:], commit=commit, device=device)
    record |= {"shape": shape, "tokens": tokens, "rows": [], "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if (gpu and case.gpus > torch.cuda.device_count()) or (only and case.name not in only):
                continue
            begin = time.perf_counter()
            try:
                row = _run(case, shape, tokens, Path(folder), seconds, gpu)
                record["rows"].append(row | {"run_seconds": time.perf_counter() - begin})
                print(json.dumps(record["rows"][-1]), flush=True)
            except (subprocess.SubprocessError, RuntimeError) as error:
                record["failed"][case.name] = str(error)
                print(f"{case.name} failed: {error}", file=sys.stderr, flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1) + "\n")
            out.with_suffix(".md").write_text(as_markdown(record))


def _run(case: Case, shape: str, tokens: int, folder: Path, seconds: float, gpu: str | None) -> dict[str, Any]:
    config = write(case, shape, tokens, folder)
    run_command(["train", str(config)], gpus=case.gpus, seconds=seconds)
    run = folder / "runs" / config.stem
    curves, measurement = read_curves(run), measure_run(run, gpu=gpu)
    row = {
        "name": case.name,
        "gpus": case.gpus,
        "losses": [loss for _, loss in sorted(curves["train/loss"].items())],
        "step_seconds": measurement.step_seconds,
        "tokens_per_second_per_gpu": 2 * tokens / case.gpus / measurement.step_seconds,
        "allocated_gib": measurement.allocated_gib,
        "planned_gib": _planned_gib(measurement, gpu),
        "density": measurement.density,
    }
    return row | (_saves(curves) if case.saves else {})


def _planned_gib(measurement: Measurement, gpu: str | None) -> float | None:
    kind = next((name for name in GPUS if name in (gpu or "")), None)
    return None if kind is None else predict_measured(measurement, Assumptions(), gpu=kind).peak.allocated / GIB


def _saves(curves: dict[str, dict[int, float]]) -> dict[str, float]:
    """Return the longest pause of the steps for a save, and the time of a step before the first save and after it."""
    steps, pauses = curves["perf/step_seconds"], curves["time_max/save"]
    before = [seconds for step, seconds in steps.items() if SAVES_EVERY // 2 < step <= SAVES_EVERY]
    return {
        "save_pause_seconds": max(pauses.values()),
        "step_seconds_before_save": statistics.median(before),
        "step_seconds_while_saving": steps[SAVES_EVERY + 1],
    }


if __name__ == "__main__":
    typer.run(main)

#!/usr/bin/env python
"""Accuracy of the planner: makes runs on this machine's GPUs, and compares them with its predictions.

    python -m tools.benchmarks.planner run --out OUT/measured_1gpu.json         # cases for as many GPUs as there are
    python -m tools.benchmarks.planner compare OUT/*.json --out docs/results/plan_h100.json

`run` starts each case of `CASES` that wants this many GPUs as `dash-dist train configs/plan_check.yaml ...`, about 40
seconds each, reads its curves and writes one JSON file. `compare` calibrates on the cases that are marked for it and
predicts the others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dash_dist.planning import GPUS, Assumptions, Prediction
from dash_dist.planning.calibration import GIB, Calibration, fit, predict_measured
from dash_dist.planning.measurements import Measurement, measure_run, read_measurements
from tools.benchmarks.common.environment import ROOT
from tools.benchmarks.common.launch import run_command


@dataclass(frozen=True)
class Case:
    """One run. calibrates: its measurement may be used to fit the planner's factors; the others only to check it."""

    name: str
    overrides: str
    gpus: int = 1
    calibrates: bool = False


_SMALL = "model.hidden_size=1024 model.ffn_hidden_size=4096 model.num_attention_heads=8 model.num_kv_heads=2"
CASES = (
    Case("none_32k", "", calibrates=True),
    Case("small_full_64k", f"{_SMALL} training.sequence_length=65536 parallel.recompute=full", calibrates=True),
    Case("full_64k", "training.sequence_length=65536 parallel.recompute=full"),
    Case("selective_64k", "training.sequence_length=65536 parallel.recompute=selective"),
    Case("none_64k", f"{_SMALL} training.sequence_length=65536"),
    Case("dense_32k", "attention.routing_scale=1.0"),
    Case(
        "head_dim_64",
        "model.num_layers=16 model.hidden_size=1024 model.ffn_hidden_size=4096 model.num_attention_heads=16 "
        "model.head_dim=64 training.global_batch_size=2",
    ),
    Case("group_16", f"{_SMALL} model.num_attention_heads=16 model.num_kv_heads=1 model.head_dim=128"),
    Case("cp2_64k", "parallel.context=2 training.sequence_length=65536", gpus=2),
    Case("cp2_full_128k", "parallel.context=2 training.sequence_length=131072 parallel.recompute=full", gpus=2),
    Case(
        "cp2_selective_128k", "parallel.context=2 training.sequence_length=131072 parallel.recompute=selective", gpus=2
    ),
    Case("tp2_32k", "parallel.tensor=2", gpus=2),
    Case("pp2_32k", "parallel.pipeline=2 training.global_batch_size=4", gpus=2),
    Case("dp2_32k", "training.global_batch_size=2", gpus=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="make the runs")
    running.add_argument("--out", type=Path, required=True, help="JSON file to write; written again after each case")
    running.add_argument("--only", nargs="*", help="names of cases")
    running.add_argument("--timeout", type=float, default=180, help="seconds for each case")
    running.set_defaults(call=run)
    comparing = commands.add_parser("compare", help="compare with predictions")
    comparing.add_argument("measured", type=Path, nargs="+", help="JSON files that `run` wrote")
    comparing.add_argument("--out", type=Path, help="JSON file to write: measurements, calibration and errors")
    comparing.set_defaults(call=compare)
    arguments = parser.parse_args()
    arguments.call(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Each case that wants this machine's number of GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    cases = [case for case in CASES if case.gpus == gpus or (arguments.only and case.name in arguments.only)]
    if arguments.only:
        cases = [case for case in cases if case.name in arguments.only]
    if not cases:
        raise SystemExit(f"no case wants {gpus} GPUs: {', '.join(f'{case.name} ({case.gpus})' for case in CASES)}")
    gpu = torch.cuda.get_device_name(0)
    environment = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
    measured, failed = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            try:
                measured.append(_measure(case, Path(folder), gpu, arguments.timeout).as_json())
                print(json.dumps({k: v for k, v in measured[-1].items() if k != "config"}), flush=True)
            except (subprocess.SubprocessError, RuntimeError) as error:
                failed[case.name] = str(error)
                print(f"{case.name} failed: {error}", file=sys.stderr, flush=True)
            result = {"environment": environment, "measurements": measured, "failed": failed}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _measure(case: Case, folder: Path, gpu: str, timeout: float) -> Measurement:
    arguments = ["train", str(ROOT / "configs/plan_check.yaml"), *case.overrides.split()]
    run_command([*arguments, f"run.name={case.name}", f"run.directory={folder}"], gpus=case.gpus, seconds=timeout)
    shutil.rmtree(folder / case.name / "checkpoints", ignore_errors=True)
    return measure_run(folder / case.name, gpu=gpu)


def compare(arguments: argparse.Namespace) -> None:
    """Errors of memory and time, before calibration and after it."""
    measurements = [one for path in arguments.measured for one in read_measurements(path)]
    calibrating = {case.name for case in CASES if case.calibrates}
    used = [one for one in measurements if one.name in calibrating]
    if not used:
        raise SystemExit(f"none of the runs that calibrate was measured: {', '.join(sorted(calibrating))}")
    calibration = fit(used, gpu=_kind(used[0]))
    rows = [_compared(one, calibration, fitted=one.name in calibrating) for one in measurements]
    print(_table(rows))
    print(f"\n{calibration}")
    if arguments.out is not None:
        environments = [json.loads(path.read_text(encoding="utf-8")).get("environment") for path in arguments.measured]
        content = {
            "environments": environments,
            **calibration.as_json(),
            "rows": rows,
            "measurements": [one.as_json() for one in measurements],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _kind(measurement: Measurement) -> str:
    kind = next((name for name in GPUS if name in (measurement.gpu or "")), None)
    if kind is None:
        raise SystemExit(f"{measurement.name} was measured on {measurement.gpu}, which the planner does not know")
    return kind


def _compared(measurement: Measurement, calibration: Calibration, *, fitted: bool) -> dict[str, Any]:
    """One row. error_*: predicted / measured - 1."""
    plain = Assumptions()
    before, after = (
        predict_measured(measurement, assumptions, gpu=_kind(measurement))
        for assumptions in (plain, calibration.apply(plain))
    )
    row: dict[str, Any] = {
        "name": measurement.name,
        "gpu": _kind(measurement),
        "gpus": measurement.gpus,
        "layout": str(before.layout),
        "calibrates": fitted,
        "density": measurement.density,
        "measured_seconds": measurement.step_seconds,
        "measured_gib": measurement.allocated_gib,
        "measured_reserved_gib": measurement.reserved_gib,
    }
    for when, prediction in (("", before), ("calibrated_", after)):
        row |= {f"{when}seconds": prediction.seconds, f"{when}gib": prediction.peak.allocated / GIB}
        row[f"{when}error_seconds"] = prediction.seconds / measurement.step_seconds - 1
        if measurement.allocated_gib:
            row[f"{when}error_gib"] = prediction.peak.allocated / GIB / measurement.allocated_gib - 1
    return row | {"parts": _parts(before)}


def _parts(prediction: Prediction) -> dict[str, float]:
    return {f.name: getattr(prediction.time, f.name) for f in fields(prediction.time)}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | layout | density | step, s: measured | predicted | calibrated "
        "| memory, GiB: measured | predicted | calibrated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["name"] + (" (calibrates)" if row["calibrates"] else "")
        cells = [f"{name}, {row['gpus']} x {row['gpu']}", row["layout"], f"{row['density']:.3f}"]
        for unit, places in (("seconds", 3), ("gib", 2)):
            cells.append(f"{row[f'measured_{unit}']:.{places}f}")
            for when in ("", "calibrated_"):
                cells.append(f"{row[f'{when}{unit}']:.{places}f} ({100 * row[f'{when}error_{unit}']:+.0f} %)")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

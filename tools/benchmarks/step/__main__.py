"""Seconds of whole training steps at long sequences, by setting and by part, beside transformers with Liger and cuDNN.

    python -m tools.benchmarks.step --out docs/results/step_h200.json        # cases for as many GPUs as there are

Every case is a `dash-dist profile` of its own, on random weights. Knows runs and results; does not know settings.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dash_dist.config.file import load_config
from dash_dist.run.profile import Profile, read_profile
from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.common.launch import run_command, run_python
from tools.benchmarks.step.cases import CASES, STEPS, Case, floor_seconds, write
from tools.benchmarks.step.table import as_markdown

_PROGRAM = "tools.benchmarks.step"
_PEER = "transformers, Liger, cuDNN"


def main(
    out: Annotated[Path, typer.Option(help="Results as JSON, with a table beside it as .md.")],
    tokens: Annotated[int, typer.Option(help="Sequence length of cases without their own.")] = 131_072,
    only: Annotated[list[str] | None, typer.Option(help="Name of a case; may be repeated. The peer is 'peer'.")] = None,
    seconds: Annotated[float, typer.Option(help="Time limit of a case.")] = 180.0,
    shape: Annotated[str | None, typer.Option(help="Shape for all cases, such as tiny on a CPU.")] = None,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Run the cases one after another; results are written after each."""
    names = [case.name for case in CASES]
    if unknown := sorted(set(only or ()) - {*names, "peer"}):
        raise typer.BadParameter(f"no case is named {', '.join(unknown)}: there are peer, {', '.join(names)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = max(torch.cuda.device_count(), 1)
    record = describe_environment(_PROGRAM, sys.argv[1:], commit=commit, device=device) | {"rows": [], "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.gpus != gpus or (only and case.name not in only):
                continue
            _record(record, case.name, functools.partial(_run, case, tokens, Path(folder), seconds, shape))
            _write(record, out)
        if device == "cuda" and gpus == 1 and (not only or "peer" in only):
            _record(record, _PEER, lambda: _peer(shape or "1b", tokens, seconds))
            _write(record, out)


def _record(record: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]]) -> None:
    begin = time.perf_counter()
    try:
        row = measure() | {"run_seconds": time.perf_counter() - begin}
        record["rows"].append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "parts"}), flush=True)
    except (subprocess.SubprocessError, RuntimeError) as error:
        record["failed"][name] = str(error)
        print(f"{name} failed: {error}", file=sys.stderr, flush=True)


def _run(case: Case, tokens: int, folder: Path, seconds: float, shape: str | None) -> dict[str, Any]:
    case = Case(case.name, shape or case.shape, case.gpus, case.tokens, case.changes)
    config = write(case, tokens, folder)
    out = folder / f"{config.stem}_profile"
    run_command(["profile", str(config), "--steps", str(STEPS), "--out", str(out)], gpus=case.gpus, seconds=seconds)
    profile = read_profile(out)
    if profile is None:
        raise RuntimeError(f"no profile in {out}")
    length = case.tokens or tokens
    row = {"name": case.name, "shape": case.shape, "gpus": case.gpus, "tokens": length, "density": profile.density}
    speed = _speed(length // case.gpus, profile.step_seconds, profile.memory.get("allocated_peak_gib"))
    of_profile = {"parts": _parts(profile), "profiled_seconds": profile.profiled_seconds}
    floor = {"floor_seconds": floor_seconds(load_config(config), case.gpus)}
    return row | speed | floor | of_profile | {"is_peer": False}


def _parts(profile: Profile) -> dict[str, float]:
    """Return title -> seconds of every part and of the gaps, which add up to the step under the profiler."""
    return {part.title: part.seconds for part in profile.parts} | {"gaps: elsewhere": profile.gap_seconds}


def _peer(shape: str, tokens: int, seconds: float) -> dict[str, Any]:
    found = json.loads(run_python(["-m", f"{_PROGRAM}.peer", shape, str(tokens)], seconds=seconds).splitlines()[-1])
    row = {"name": _PEER, "shape": shape, "gpus": 1, "tokens": tokens, "density": None}
    return row | _speed(tokens, found["step_seconds"], found["allocated_gib"]) | {"is_peer": True}


def _speed(tokens: int, step_seconds: float, allocated_gib: float | None) -> dict[str, Any]:
    """Return the measurements of a step of so many tokens a GPU."""
    return {
        "step_seconds": step_seconds,
        "tokens_per_second": tokens / step_seconds,
        "allocated_gib": allocated_gib,
    }


def _write(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(record))


if __name__ == "__main__":
    typer.run(main)

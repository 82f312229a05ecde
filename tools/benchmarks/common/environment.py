"""Record of the machine, the software and the command that made a results file."""

from __future__ import annotations

import datetime
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.common.inputs import SEED

ROOT = Path(__file__).resolve().parents[3]


def describe_environment(program: str, arguments: list[str], *, commit: str | None, device: str) -> dict[str, Any]:
    """program: the module of the command; commit: what to call this tree, None for git's HEAD;
    device: "cuda", or "cpu" for a run that only tries the program out.
    """
    import triton

    return (_gpu() if device == "cuda" else {"gpu": "none, on the CPU"}) | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or commit_of(ROOT),
        "command": shlex.join(["python", "-m", program, *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": SEED,
    }


def _gpu() -> dict[str, Any]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def commit_of(directory: Path) -> str:
    """HEAD of the checkout at a directory, marked where its files were changed; "unknown" without git's data."""
    if not (directory / ".git").exists():  # git itself would go on to a repository around the directory
        return "unknown"
    head = _output("git", "-C", str(directory), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(directory), "status", "--porcelain", "--untracked-files=no")
    return f"{head or 'unknown'}{' with changes' if changed else ''}"


def _output(*command: str) -> str:
    """Return a command's output, stripped; empty where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""

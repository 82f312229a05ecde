"""Programs that a benchmark starts: one process for each GPU, ended in time.

Knows processes; does not know what they run.
"""

from __future__ import annotations

import subprocess
import sys

from tools.benchmarks.common.environment import ROOT

_TRACEBACK = "Traceback (most recent call last)"
_LAUNCHER_FAILED = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"


def run_command(arguments: list[str], *, gpus: int, seconds: float) -> str:
    """Return the output of `dash-dist ARGUMENTS` with a process for each of `gpus`. Raises as `run_python`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    return run_python([*launcher, "-m", "dash_dist.cli", *arguments], seconds=seconds)


def run_python(arguments: list[str], *, seconds: float) -> str:
    """Return the output of `python ARGUMENTS`. A program that takes longer is asked to end first, for torchrun's ranks.

    Raises:
        subprocess.TimeoutExpired: it took more than `seconds`.
        RuntimeError: its exit status is not 0; with the end of what it wrote.
    """
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if process.returncode:
        reason = _without_launcher(errors).strip() or out
        raise RuntimeError(f"exit status {process.returncode}: {reason[-1500:]}")
    return out


def _without_launcher(errors: str) -> str:
    """Leave out the launcher's own traceback at the end, which names no reason."""
    before, _, _ = errors.partition(_LAUNCHER_FAILED)
    return before.rpartition(_TRACEBACK)[0] if before != errors else errors

"""Cells that are measured side by side, each in a process of its own.

Knows processes, GPUs and logs; does not know how a cell is measured. Each process leads a session: Ctrl-C reaches the
study alone, which asks the others to end once, and after a process ends all that it has left.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import IO, cast

import torch

from dash_dist.training.stopping import StopSignal
from tools.benchmarks.common.environment import ROOT
from tools.study.deadline import Deadline
from tools.study.parts import Cell
from tools.study.results import Record

Work = Callable[[Cell], Record]
"""Measures a cell, as `measure` does. It is pickled."""

_POLL = 0.2
_LEAVING = 60.0
"""Seconds that a process has to end after its answer."""


@dataclass(frozen=True)
class Outcome:
    """The end of one job.

    Attributes:
        seconds: that the process lived.
        log: all that it printed, behind that of earlier calls.
        record: None where the cell has no result.
        error: the reason for that; None if the cell was stopped and has to be measured again.
    """

    cell: Cell
    seconds: float
    log: Path
    record: Record | None
    error: str | None


def visible_gpus() -> list[str]:
    """Return the names of the GPUs as CUDA_VISIBLE_DEVICES takes them; one empty name on a machine without any."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(count)])[:count] or [""]


def run_jobs(
    cells: Iterable[Cell],
    work: Work,
    ended: Callable[[Outcome], None],
    *,
    gpus: Sequence[str],
    per_gpu: int,
    logs: Path,
    deadline: Deadline,
) -> None:
    """Measure cells side by side, and return when no process is left. A failure is that of its cell alone.

    Cells begin in their order, but those of one run never overlap. SIGTERM and Ctrl-C let all trainings save, and end
    the call; so does the deadline.

    Args:
        ended: called with each outcome, in the order of the ends.
        gpus: see `visible_gpus`; each process sees one of them.
        per_gpu: processes on each, at most.
        logs: folder of a file for each cell.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running = list(cells), list[_Job]()
    with StopSignal() as stop:
        try:
            while True:
                if stop.requested or deadline.near:
                    waiting.clear()
                if stop.requested or deadline.over:
                    for job in running:
                        job.stop()
                while len(running) < per_gpu * len(gpus) and (cell := _next(waiting, running)):
                    waiting.remove(cell)
                    running.append(_Job(cell, _least_used(gpus, running), work, logs))
                if not running:
                    return
                ready = connection.wait([job.answer.fileno() for job in running], _POLL)
                for job in [one for one in running if one.answer.fileno() in ready]:
                    outcome = job.outcome()
                    running.remove(job)
                    ended(outcome)
        finally:
            for job in running:
                job.kill()


def _next(waiting: Sequence[Cell], running: Sequence[_Job]) -> Cell | None:
    """Return the first cell whose run no process is at."""
    busy = {job.cell.run for job in running}
    return next((cell for cell in waiting if cell.run not in busy), None)


def _least_used(gpus: Sequence[str], running: Sequence[_Job]) -> str:
    used = [job.gpu for job in running]
    return min(gpus, key=used.count)


class _Job:
    """The process of one cell, which runs from now on."""

    def __init__(self, cell: Cell, gpu: str, work: Work, logs: Path) -> None:
        self.cell, self.gpu = cell, gpu
        self._log = logs / f"{cell.part}.{cell.method}.seed{cell.seed}.log"
        self._began, self._asked = time.monotonic(), False
        with self._log.open("ab") as log, tempfile.TemporaryFile() as task:
            pickle.dump((work, cell), task)
            task.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.study.job"],
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
                stdin=task,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.answer = cast(IO[bytes], self._process.stdout)

    def stop(self) -> None:
        """Ask the process to end, once: a second signal would end a training that saves."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def outcome(self) -> Outcome:
        """Return the outcome of a process that has answered, or ended without."""
        try:
            answer = json.loads(self.answer.read())
        except ValueError:
            answer = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVING)
        self.kill()
        if answer is None:
            answer = {"record": None, "error": None if self._asked else self._end()}
        return Outcome(self.cell, time.monotonic() - self._began, self._log, **answer)

    def kill(self) -> None:
        """End the process, and those that it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.answer.close()

    def _end(self) -> str:
        status = self._process.returncode
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

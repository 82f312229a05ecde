"""The beginning and the end of an attempt, and the report on the one before.

Knows the attempt's record and the events of the one before; does not know what the attempt does.
"""

import contextlib
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from dash_dist.checkpoints.folders import step_of
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import RunError
from dash_dist.run.attempts import AttemptRecord, last_attempt
from dash_dist.training.faults.fault_log import FaultLog
from dash_dist.training.faults.watchdog import describe_hang, hang_folder


class Attempt:
    """Context that records how an attempt ended. `ended` stays None after a crash, a kill or a retryable error.

    Args:
        run_directory: where rank 0 writes; None at the other ranks.
        record: the attempt at its beginning, on disk already. Later writes that the disk refuses are skipped.
    """

    def __init__(self, run_directory: Path | None, record: AttemptRecord) -> None:
        self._run_directory = run_directory
        self._record = record

    @property
    def number(self) -> int:
        return self._record.attempt

    def __enter__(self) -> Self:
        return self

    def reached(self, step: int) -> None:
        """Note that `step` steps are done."""
        self._update(replace(self._record, step=step))

    def completed(self, step: int, *, stopped: bool) -> None:
        """Note the end of the run's work, finished or stopped on request."""
        self._update(replace(self._record, step=step, ended="stopped" if stopped else "finished"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RunError) and not error.retryable:
            self._update(replace(self._record, ended="error"))

    def _update(self, record: AttemptRecord) -> None:
        self._record = record
        if self._run_directory is not None:
            with contextlib.suppress(OSError):  # costs a figure in a message, and must not end the run
                record.write(self._run_directory)


def begin_attempt(run_directory: Path, control: ControlGroup, log: FaultLog, origin: Path | None) -> Attempt:
    """Begin the next attempt from the checkpoint `origin`, and record the loss of the one before.

    The supervisor has recorded that loss already where it lives on: then only the steps done again are added. Called
    at every rank; raises RunError at every rank if the run's folder cannot be written.
    """
    host = socket.gethostname()
    record = AttemptRecord(1, time.time(), host, os.getpid(), control.size, (origin and step_of(origin)) or 0)
    with control.together(f"cannot prepare {run_directory}", RunError):
        if control.is_main:
            last = last_attempt(run_directory)
            if last is not None:
                record = replace(record, attempt=last.attempt + 1)
            if last is not None and last.ended is None:
                _tell_of(last, record, origin, log, describe_hang(hang_folder(run_directory, last.attempt)))
                # Until it gets as far itself: if it dies at once, what was lost before is still lost.
                record = replace(record, step=max(last.step, record.step))
            record.write(run_directory)
    return Attempt(run_directory if control.is_main else None, control.from_main(record))


def _tell_of(last: AttemptRecord, now: AttemptRecord, origin: Path | None, log: FaultLog, hang: str | None) -> None:
    if hang is not None:
        log.record("hang", f"attempt {last.attempt}, after step {last.step}: {hang}", step=last.step)
    resumed = (
        f"attempt {now.attempt} ({now.world_size} processes) continues from {origin or 'the start'}; steps done again: "
        f"{max(0, last.step - now.step)}"
    )
    if log.has_restart_after(last.attempt):
        log.record("resumed", resumed, step=now.step)
    else:
        lost = f"attempt {last.attempt} ({last.world_size} processes, rank 0 on {last.host}) did not end by itself"
        log.record("restart", f"{lost}; {resumed}", step=now.step)

"""Which attempt of a run this is, and whether the one before ended by itself.

Knows one small file; does not know what the attempt does.

    <run directory>/attempt.json
"""

import contextlib
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from dash_dist.checkpoints.folders import step_of
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import RunError
from dash_dist.run.files import read_json, replace_json
from dash_dist.run.restarts import script_started_at
from dash_dist.training.faults.fault_log import FaultLog
from dash_dist.training.faults.watchdog import describe_hang, hang_folder

Ended = Literal["finished", "stopped", "error"]


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt.

    Attributes:
        attempt: counts from 1.
        started: seconds since 1970.
        host, pid: of rank 0.
        step: the last one known to be done.
        ended: how it ended by itself ("error": with a RunError, which says what to change); None while it runs, and
            for ever if it was killed, crashed or hung, or storage or a server did not answer.
    """

    attempt: int
    started: float
    host: str
    pid: int
    world_size: int
    step: int
    ended: Ended | None = None


class Attempt:
    """Context of one attempt: leaves `ended` None if left by anything but its end or a RunError that will not pass.

    Rank 0's writes; on entering, the disk must take it, and later on a refusal is passed over.
    """

    def __init__(self, path: Path | None, record: AttemptRecord) -> None:
        self._path = path
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
        if isinstance(error, RunError) and not error.may_pass:
            self._update(replace(self._record, ended="error"))

    def _update(self, record: AttemptRecord) -> None:
        self._record = record
        if self._path is not None:
            with contextlib.suppress(OSError):  # costs a figure in a message, and must not end the run
                replace_json(self._path, asdict(record))


def begin_attempt(run_directory: Path, control: ControlGroup, log: FaultLog, origin: Path | None) -> Attempt:
    """Begin the next attempt, which goes on from the checkpoint `origin`, and tell of the one before if it did not end
    by itself. Called at every rank; raises RunError at every rank if the run's folder cannot be written."""
    host = socket.gethostname()
    record = AttemptRecord(1, time.time(), host, os.getpid(), control.size, (origin and step_of(origin)) or 0)
    path = run_directory / "attempt.json"
    with control.together(f"cannot prepare {run_directory}", RunError):
        if control.is_main:
            last = _last_attempt(path)
            if last is not None:
                record = replace(record, attempt=last.attempt + 1)
            if last is not None and last.ended is None:
                _tell_of(last, record, origin, log, describe_hang(hang_folder(run_directory, last.attempt)))
                # Until it gets as far itself: if it dies at once, what was lost before is still lost.
                record = replace(record, step=max(last.step, record.step))
            replace_json(path, asdict(record))
    return Attempt(path if control.is_main else None, control.from_main(record))


def went_on_before(run_directory: Path, control: ControlGroup) -> bool:
    """Return whether the script that restarts this run has begun an earlier attempt. Called at every rank.

    What is in the folder then is this run's own, whatever `run.resume` says of an earlier one's.
    """
    since = script_started_at()
    found = False
    with control.together(f"cannot read {run_directory}", RunError):
        if control.is_main and since is not None:
            last = _last_attempt(run_directory / "attempt.json")
            found = last is not None and last.started >= since
    return control.from_main(found)


def _last_attempt(path: Path) -> AttemptRecord | None:
    try:
        record = read_json(path)
        return None if record is None else AttemptRecord(**record)
    except (ValueError, TypeError):
        return None  # not written by this version: it only tells what happened, and is no reason not to train


def _tell_of(last: AttemptRecord, now: AttemptRecord, origin: Path | None, log: FaultLog, hang: str | None) -> None:
    if hang is not None:
        log.record("hang", f"attempt {last.attempt}, after step {last.step}: {hang}", step=last.step)
    log.record(
        "restart",
        f"attempt {last.attempt} ({last.world_size} processes, rank 0 on {last.host}) did not end by itself; attempt "
        f"{now.attempt} ({now.world_size} processes) goes on from {origin or 'the start'}; steps done again: "
        f"{max(0, last.step - now.step)}",
        step=now.step,
    )

"""Causes of lost attempts, written into the run's event log by the process that starts attempts.

Knows the run's folder; does not know how a cause is found nor what follows it.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

from dash_dist.checkpoints.folders import step_of, visible_checkpoints
from dash_dist.run.attempts import AttemptRecord, last_attempt
from dash_dist.run.events import EventKind, EventLog
from dash_dist.training.faults.watchdog import describe_hang, hang_folder


class FailureLog:
    """Failures of one run, as its supervisor sees them. Disk errors are told and never raised.

    Args:
        run_directory: of the run; need not exist.
        note: receives the reason where the disk refuses an event.
    """

    def __init__(self, run_directory: Path, note: Callable[[str], None]) -> None:
        self._run_directory = run_directory
        self._note = note
        self._before = 0
        self._failed_before = 0

    def saved_step(self) -> int:
        """Return the step of the newest complete checkpoint, 0 for none."""
        found = visible_checkpoints(self._run_directory / "checkpoints")
        return max((step_of(folder) or 0 for folder in found), default=0)

    def begin(self) -> None:
        """Remember the newest attempt and the errors so far: later ones belong to the attempt that is started now.

        Makes the run's folder, in which that attempt leaves a permanent error.
        """
        with contextlib.suppress(OSError):
            self._run_directory.mkdir(parents=True, exist_ok=True)
        newest = self._newest()
        self._before = newest.attempt if newest is not None else 0
        self._failed_before = self._count_failed()

    def attempt(self) -> AttemptRecord | None:
        """Return the attempt that began since `begin`; None for a failure before training."""
        newest = self._newest()
        return newest if newest is not None and newest.attempt > self._before else None

    def failed_for_good(self) -> bool:
        """Return whether a permanent error was recorded since `begin`."""
        return self._count_failed() > self._failed_before

    def restart(self, cause: str) -> None:
        """Record that the attempt was lost for `cause`, and another follows."""
        lost = self.attempt()
        if lost is None:
            self.record("restart", f"the start of an attempt failed: {cause}")
            return
        hang = describe_hang(hang_folder(self._run_directory, lost.attempt))
        story = f"attempt {lost.attempt} ({lost.world_size} processes) was lost: {cause}"
        self.record("restart", f"{story}; {hang}" if hang else story, attempt=lost.attempt)

    def record(self, kind: EventKind, message: str, *, attempt: int | None = None) -> None:
        """Append an event at the newest checkpoint's step."""
        try:
            self._run_directory.mkdir(parents=True, exist_ok=True)
            EventLog(self._run_directory).append(kind, message, step=self.saved_step(), attempt=attempt)
        except OSError as error:  # a full disk does not keep the run from going on
            self._note(f"the event could not be written: {error}")

    def _count_failed(self) -> int:
        try:
            return sum(event.kind == "failed" for event in EventLog(self._run_directory).read())
        except OSError:
            return 0

    def _newest(self) -> AttemptRecord | None:
        try:
            return last_attempt(self._run_directory)
        except OSError:
            return None

"""Permanent errors of a run in its event log, where the process that restarts the run looks for them.

Knows which errors are permanent; does not know who restarts the run.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dash_dist.errors import RankError, RunError
from dash_dist.run.attempts import last_attempt
from dash_dist.run.events import EventLog
from dash_dist.training.faults.lock import RunLock


@contextlib.contextmanager
def permanent_failures_recorded(run_directory: Path) -> Iterator[None]:
    """Record a RunError of the body as the event `failed`, unless another attempt may succeed. Re-raises it.

    Entered at every rank, outside the run's own lock; rank 0 writes, and a rank that fails alone. Such a rank notes the
    end of the attempt too: rank 0 is ended before it can.
    """
    try:
        yield
    except RankError as error:
        with contextlib.suppress(OSError):
            EventLog(run_directory).append("failed", str(error))  # rank 0 holds the lock, perhaps in a collective
            if (attempt := last_attempt(run_directory)) is not None:
                replace(attempt, ended="error").write(run_directory)
        raise
    except RunError as error:
        if not error.retryable and os.environ.get("RANK", "0") == "0":
            mark_permanent_failure(run_directory, error)
        raise


def mark_permanent_failure(run_directory: Path, error: RunError) -> None:
    """Append the event `failed`. Skipped without a folder, on a full disk, and while another run holds the folder."""
    with contextlib.suppress(OSError, RunError):  # costs attempts that end with the same error
        if run_directory.is_dir():
            with RunLock(run_directory, lambda _: None, patience=0.0):
                EventLog(run_directory).append("failed", str(error))

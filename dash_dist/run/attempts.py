"""Record of a run's newest attempt, for the run itself and for the process that starts attempts.

Knows one small file; does not know what an attempt does nor what follows it.

    <run directory>/attempt.json
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dash_dist.run.files import read_json, replace_json

AttemptEnd = Literal["finished", "stopped", "error"]


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt.

    Attributes:
        attempt: counts from 1.
        started: seconds since 1970.
        host, pid: of rank 0.
        step: the last one known to be done.
        ended: how it ended by itself. "error": with a permanent RunError, which says what to change. None while it
            runs, and after a kill, a crash, a hang or a retryable error.
    """

    attempt: int
    started: float
    host: str
    pid: int
    world_size: int
    step: int
    ended: AttemptEnd | None = None

    def write(self, run_directory: Path) -> None:
        """Replace the record of the run. Raises OSError."""
        replace_json(run_directory / "attempt.json", asdict(self))


def last_attempt(run_directory: Path) -> AttemptRecord | None:
    """Return the newest attempt of the run; None without one or for an unreadable record. Raises OSError."""
    try:
        record = read_json(run_directory / "attempt.json")
        return None if record is None else AttemptRecord(**record)
    except (ValueError, TypeError):
        return None  # written by another version: costs details of a message, and is no reason not to train

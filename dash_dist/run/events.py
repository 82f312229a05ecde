"""Event log of a run: faults, recoveries and skipped batches, one line of JSON each.

Knows the file and the kinds of events; does not know how they are detected. The ranks and the supervisor write to the
same file, which therefore covers all attempts of a run.

    <run directory>/events.jsonl
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

EventKind = Literal[
    "restart",  # an attempt was lost, and the run is started again; the message names the cause
    "resumed",  # the attempt after a `restart` began; the message names the checkpoint and the steps done again
    "failed",  # the run ended with an error, and is not started again
    "preemption",  # a node is about to be taken away
    "hang",  # no progress for longer than allowed
    "save_failed",  # a checkpoint could not be written
    "checkpoint_damaged",  # a checkpoint was stepped over
    "batch_skipped",  # a batch whose loss or gradients were not finite, or whose loss was a spike
    "rollback",  # weights, optimizer and data were set back to a checkpoint
    "data_damaged",  # documents that cannot be read are skipped
    "data_changed",  # documents, sources or sizes are not those of the checkpoint
    "metrics_failed",  # curves could not be written
    "resized",  # the run continues with another number of processes
    "schedule_changed",  # the run continues with another learning-rate curve than its checkpoint's
    "stage",  # a stage begins, or passes its gate
    "trainable_changed",  # the run continues with parameters that its checkpoint had no optimizer state of
]

EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)


@dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        time: seconds since 1970.
        step: optimizer steps done by then; None where unknown.
        attempt: number of the lost attempt; None for events other than `restart`, and where no attempt had begun.
    """

    time: float
    kind: EventKind
    step: int | None
    message: str
    attempt: int | None = None


class EventLog:
    """The events of the run in `run_directory`, which must exist. One process at a time appends."""

    def __init__(self, run_directory: Path) -> None:
        self.path = run_directory / "events.jsonl"

    def append(self, kind: EventKind, message: str, *, step: int | None = None, attempt: int | None = None) -> Event:
        """Write one event, which is on disk when this returns. Raises OSError."""
        event = Event(time=time.time(), kind=kind, step=step, message=message, attempt=attempt)
        # Start a new line after one that a killed process left unfinished.
        line = json.dumps(asdict(event)) + "\n"
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return event

    def read(self) -> list[Event]:
        """Return all events, oldest first, without lines cut short by a killed process. Raises OSError."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [event for event in map(_parse, lines) if event is not None]


def _parse(line: str) -> Event | None:
    try:
        event = Event(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        return None
    return event if event.kind in EVENT_KINDS else None

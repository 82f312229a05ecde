"""Log of faults and recoveries in three places: the run's event file, its progress output, its curves.

Knows events; does not know how they are detected nor what is done about them.
"""

import contextlib
from collections import Counter
from pathlib import Path

from dash_dist.run.events import EVENT_KINDS, EventKind, EventLog
from dash_dist.run.messages import ProgressReporter
from dash_dist.training.telemetry.curves import Curves
from dash_dist.training.telemetry.metrics import MetricsWriter


class FaultLog:
    """Fault log of one process. All ranks call it; only the main one writes.

    Attributes:
        curves: receive the counts; None until the first step of the curves is known.
    """

    def __init__(self, run_directory: Path, reporter: ProgressReporter, *, is_main: bool) -> None:
        self._events = EventLog(run_directory)
        self._reporter = reporter
        self._is_main = is_main
        self.curves: Curves | None = None
        self._unwritten: list[tuple[EventKind, str, int | None]] = []
        self._texts: list[tuple[EventKind, str]] = []
        self._size = -1
        self._counts: Counter[str] = Counter()

    def record(self, kind: EventKind, message: str, *, step: int, drawn_at: int | None = None) -> None:
        """Record an event after `step` steps; draw it at that step, or at `drawn_at` after a rollback."""
        if not self._is_main:
            return
        self._reporter.note(f"{kind}: {message}")
        self._unwritten.append((kind, message, step))
        self._texts.append((kind, message))
        self.draw(step if drawn_at is None else drawn_at)

    def note(self, text: str) -> None:
        """Print a text that is no event."""
        if self._is_main:
            self._reporter.note(text)

    def has_restart_after(self, attempt: int) -> bool:
        """Return whether the supervisor has recorded the loss of `attempt`; if so, draw its text with the next counts.

        Called at the main rank.
        """
        with contextlib.suppress(OSError):
            for event in self._events.read():
                if event.kind == "restart" and event.attempt == attempt:
                    self._texts.append((event.kind, event.message))
                    return True
        return False

    def draw(self, step: int) -> None:
        """Draw the count of every kind of event over all attempts and writers, as of `step`."""
        if not self._is_main:
            return
        self._append_unwritten()
        if self.curves is None:
            return
        counts = self._count()

        def write(writer: MetricsWriter) -> None:
            writer.faults(step, counts, self._texts)

        self.curves.write(step, write)
        self._texts.clear()

    def _append_unwritten(self) -> None:
        """Retry the events that the disk refused, as a full one does."""
        with contextlib.suppress(OSError):
            while self._unwritten:
                kind, message, step = self._unwritten[0]
                self._events.append(kind, message, step=step)
                del self._unwritten[0]

    def _count(self) -> dict[str, int]:
        with contextlib.suppress(OSError):
            # Read again only if somebody appended; there is no file before the first event.
            size = self._events.path.stat().st_size
            if size != self._size:
                self._counts, self._size = Counter(event.kind for event in self._events.read()), size
        unwritten = Counter(kind for kind, _, _ in self._unwritten)
        return {kind: self._counts[kind] + unwritten[kind] for kind in EVENT_KINDS}

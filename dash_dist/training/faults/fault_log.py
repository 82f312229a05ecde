"""Faults and recoveries where people look for them: the run's event file, its progress, its curves.

Knows what was noticed and tells it on; does not know what is done about it.
"""

import contextlib
from collections import Counter
from pathlib import Path

from dash_dist.run.events import EVENT_KINDS, EventKind, EventLog
from dash_dist.run.messages import ProgressReporter
from dash_dist.training.telemetry.curves import Curves
from dash_dist.training.telemetry.metrics import MetricsWriter


class FaultLog:
    """Fault log of one process; silent at every rank but the main one, so that all ranks can call it.

    Attributes:
        curves: where the counts are drawn; None until it is known at which step they begin.
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
        """Tell that `kind` happened when `step` steps were done; it is drawn there, or where the curves go on since."""
        if not self._is_main:
            return
        self._reporter.note(f"{kind}: {message}")
        self._unwritten.append((kind, message, step))
        self._texts.append((kind, message))
        self.draw(step if drawn_at is None else drawn_at)

    def note(self, text: str) -> None:
        """Tell what is no event."""
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
        """Draw how many events of each kind there were in all attempts of the run, others' included, by `step`."""
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
        """Events that the disk refused are tried again: a full one is what most of them are about."""
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

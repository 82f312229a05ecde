"""A polite end: SIGTERM or SIGINT asks the run to finish its step, save, and leave.

Knows signals; does not know what is saved. The loop asks `requested` between steps, at every rank.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class StopSignal:
    """Context in which the first SIGTERM or SIGINT only sets `requested`; the next one acts as it did before.

    Outside the main thread, where Python allows no handlers, `requested` stays False: whoever runs the
    training in such a thread has its own way to ask (`train(..., requests=...)`).
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

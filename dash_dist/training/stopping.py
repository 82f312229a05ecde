"""Graceful stop: SIGTERM or SIGINT requests that the run finishes its step, saves and ends.

Knows signals; does not know the training loop, which reads `requested` between steps at every rank.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class StopSignal:
    """Context in which the first SIGTERM or SIGINT only sets `requested`; the next one acts as before.

    Python allows handlers in the main thread only. In other threads `requested` stays False, and callers use
    `train(..., requests=...)`.
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

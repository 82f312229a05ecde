"""Curves that survive a full disk and follow the run back to an earlier step.

Knows when the writer is opened; does not know the values. Rank 0 writes while the others continue, and a failure to
write must not end the run.
"""

import time
from collections.abc import Callable
from pathlib import Path

from dash_dist.training.telemetry.metrics import MetricsWriter

# Seconds until a failed writer is opened again; each successful attempt leaves a small file.
_RETRY_SECONDS = 60.0


class Curves:
    """Curves in `directory` from `start_step`.

    Args:
        start_step: see MetricsWriter.
        describe: writes the beginning of every file of curves.
        on_failure: called once with a message when curves cannot be written; it may call `write`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        start_step: int,
        describe: Callable[[MetricsWriter], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._describe = describe
        self._on_failure = on_failure
        self._last_step = start_step
        self._writer: MetricsWriter | None = None
        self._failed_at: float | None = None

    def write(self, step: int, write: Callable[[MetricsWriter], None]) -> None:
        """Call `write` for the values of `step` and make them visible; values that the disk refuses are lost."""
        if self._failed_at is not None and time.monotonic() - self._failed_at < _RETRY_SECONDS:
            return
        try:
            if self._writer is None:
                self._writer = MetricsWriter(self._directory, start_step=self._last_step)
                self._describe(self._writer)
            write(self._writer)
            self._writer.flush()
        except OSError as error:
            # Neither use nor close it again: its thread has ended, and the end of its file may be torn.
            self._writer = None
            is_news, self._failed_at = self._failed_at is None, time.monotonic()
            if is_news:
                self._on_failure(f"curves cannot be written to {self._directory}: {error}")
            return
        self._failed_at = None
        self._last_step = max(self._last_step, step)

    def restart(self, step: int) -> None:
        """Purge the curves after `step`, whose steps are undone."""
        self.close()
        self._last_step = step

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except OSError as error:
                self._on_failure(f"the last curves cannot be written to {self._directory}: {error}")

"""The MetricsWriter of a run whose disk may be full for a while, and whose steps may be undone.

Knows when the writer is opened; does not know what is written. Rank 0 has one: it writes while the others go on, and
what it cannot write must not end the run.
"""

import time
from collections.abc import Callable
from pathlib import Path

from dash_dist.training.telemetry.metrics import MetricsWriter

# A writer that failed is opened again after this long, in seconds; each try leaves a small file where it works.
_RETRY_SECONDS = 60.0


class Curves:
    """Curves in `directory` from `start_step` on.

    Args:
        start_step: see MetricsWriter.
        describe: writes what every file of curves begins with.
        on_failure: told once, in words, when curves stop being written; it may call `write`.
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
        """Let `write` write what belongs to `step`, and make it visible; what the disk refuses is lost."""
        if self._failed_at is not None and time.monotonic() - self._failed_at < _RETRY_SECONDS:
            return
        try:
            if self._writer is None:
                self._writer = MetricsWriter(self._directory, start_step=self._last_step)
                self._describe(self._writer)
            write(self._writer)
            self._writer.flush()
        except OSError as error:
            # Its background thread is gone and the end of its file may be torn: not to be used, nor closed, again.
            self._writer = None
            is_news, self._failed_at = self._failed_at is None, time.monotonic()
            if is_news:
                self._on_failure(f"curves cannot be written to {self._directory}: {error}")
            return
        self._failed_at = None
        self._last_step = max(self._last_step, step)

    def restart(self, step: int) -> None:
        """Purge what was written beyond `step` steps: they are undone."""
        self.close()
        self._last_step = step

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except OSError as error:
                self._on_failure(f"the last curves cannot be written to {self._directory}: {error}")

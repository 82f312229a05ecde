"""Throughput of a run and its remaining time.

Knows when steps end; does not know their computation.
"""

import contextlib
import time
from collections.abc import Iterator


class Pace:
    """Tokens per second and remaining time, from the steps of this process except the first, its warm-up."""

    def __init__(self, start_step: int, steps: int) -> None:
        self._step, self._steps = start_step, steps
        self._seconds = 0.0
        self._tokens = 0
        self._counted = 0
        self._first: tuple[float, int] | None = None
        self._last = time.perf_counter()

    def step(self, tokens: int) -> float:
        """Count a step of `tokens` tokens that ended now, and return the seconds since the previous step."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._step += 1
        if self._first is None:
            self._first = (seconds, tokens)
        else:
            self._seconds += seconds
            self._tokens += tokens
            self._counted += 1
        return seconds

    def exclude_since_step(self) -> None:
        """Exclude the time since the last step, such as that of logging."""
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the time spent in this block."""
        start = time.perf_counter()
        yield
        self._last += time.perf_counter() - start

    def go_to(self, step: int) -> None:
        """Continue from `step`, and exclude the time since the last step."""
        self._step = step
        self.exclude_since_step()

    @property
    def tokens_per_second(self) -> float:
        """Mean over the counted steps; the rate of the first step until there is a second; 0.0 before the first."""
        if self._counted:
            return self._tokens / self._seconds
        return self._first[1] / self._first[0] if self._first else 0.0

    @property
    def eta_seconds(self) -> float:
        """Seconds that the remaining steps take at this pace."""
        per_step = self._seconds / self._counted if self._counted else (self._first or (0.0, 0))[0]
        return per_step * (self._steps - self._step)

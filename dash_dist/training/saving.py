"""The schedule of a run's checkpoints, and the handling of failed ones.

Knows steps and failures; does not know how a checkpoint is written. Training continues after a failure for a while: a
full disk may be emptied, and take the next checkpoint. Every method is called at every rank.
"""

import time
from collections.abc import Callable
from typing import Any

from dash_dist.engine.saveable import Saveable
from dash_dist.errors import CheckpointError
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager, Saved
from dash_dist.training.faults.fault_log import FaultLog

# A failed checkpoint is tried again after this fraction of the interval.
_RETRY_PART = 10

# Pauses before the checkpoint at the end of a run is tried again, in seconds. Short, because SIGKILL often follows
# SIGTERM half a minute later.
_PAUSES_AT_THE_END = (2.0, 8.0)


class Saver:
    """Schedule of the checkpoints at one rank.

    Args:
        log: receives failures.
        beat: called before long operations, for the watchdog.
        interval: steps between checkpoints.
        max_failures: consecutive failures that a run survives.
        time_limit: seconds to write a checkpoint in the background; None for no limit.
        saved_step: step of the checkpoint that the run starts from; None without one.

    Attributes:
        saved_step: step of the newest complete checkpoint; 0 without one.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        engine: Saveable,
        log: FaultLog,
        beat: Callable[[], None],
        *,
        interval: int,
        max_failures: int,
        time_limit: float | None,
        saved_step: int | None,
    ) -> None:
        self._checkpoints = checkpoints
        self._engine = engine
        self._log = log
        self._beat = beat
        self._interval = interval
        self._max_failures = max_failures
        self._time_limit = time_limit
        self._started_at = 0.0
        self._failures = 0
        self._any_saved = saved_step is not None
        self.saved_step = saved_step or 0
        self._next_step = self._next_regular(self.saved_step)

    def go_back_to(self, step: int) -> None:
        """Continue the schedule from the checkpoint of `step`."""
        self.saved_step = step
        self._next_step = self._next_regular(step)

    def is_due(self, state: RunState) -> bool:
        """Return whether to `start` a checkpoint of `state`.

        No checkpoint is due while consecutive steps change no weight. If too many do, these weights are in doubt, and
        their checkpoints would push out older ones.
        """
        return state.step >= self._next_step and not state.skipped_in_a_row and not self._checkpoints.pending

    def start(self, state: RunState, data_state: Any) -> None:
        """Begin a checkpoint of `state`; `data_state` is its position in the data."""
        self._beat()
        self._started_at = time.monotonic()
        self._next_step = self._next_regular(state.step)
        try:
            self._checkpoints.start(state, self._engine, data_state)
        except CheckpointError as error:
            self._count_failure(state.step, error)

    def writing(self) -> bool:
        """Return whether this rank still writes; local. The maximum over the ranks goes into `poll`."""
        return self._checkpoints.writing()

    def is_overdue(self) -> bool:
        """Return whether this rank exceeds its time to write; local. The maximum over the ranks goes into `poll`."""
        return (
            self._time_limit is not None and self.writing() and time.monotonic() - self._started_at > self._time_limit
        )

    def poll(self, step: int, *, any_writing: bool, any_overdue: bool) -> None:
        """Complete a checkpoint that all ranks have written, or abandon one that takes too long."""
        if not any_writing:
            self.settle(step)
        elif any_overdue:
            self._beat()
            self._checkpoints.abandon()
            limit = f"faults.save_timeout_seconds = {self._time_limit:g}"
            self._count_failure(
                step, CheckpointError(f"a checkpoint takes longer than {limit} to write: does the storage answer?")
            )

    def settle(self, step: int) -> None:
        """Wait for the checkpoint that is being written, if any."""
        if not self._checkpoints.pending:
            return
        self._beat()
        try:
            saved = self._checkpoints.finish()
        except CheckpointError as error:
            self._count_failure(step, error)
        else:
            self._failures = 0
            if saved is not None:
                self._take(saved)

    def save_now(self, state: RunState, data_state: Any) -> None:
        """Write a checkpoint of `state` and wait for it. A failure is counted."""
        self.settle(state.step)
        if state.step > self.saved_step:
            self.start(state, data_state)
            self.settle(state.step)

    def save_at_the_end(self, state: RunState, data_state: Any) -> None:
        """Write a checkpoint of `state` in up to three attempts. Raises CheckpointError after the last."""
        for pause in (*_PAUSES_AT_THE_END, None):
            self._beat()
            try:
                if (saved := self._checkpoints.finish()) is not None:
                    self._take(saved)
                if state.step > self.saved_step:
                    self._checkpoints.start(state, self._engine, data_state)
                    if (saved := self._checkpoints.finish()) is not None:
                        self._take(saved)
                return
            except CheckpointError as error:
                self._log.record("save_failed", f"at the end of the run: {error}", step=state.step)
                if pause is None:
                    raise CheckpointError(
                        f"{error}. The run ends at step {state.step}, {self._lost(state.step)}: make space, and the "
                        f"same command continues from there",
                        retryable=error.retryable,
                    ) from error
                self._beat()
                time.sleep(pause)

    def _take(self, saved: Saved) -> None:
        self._any_saved = True
        self.saved_step = saved.step
        if saved.not_dropped:
            self._log.record("save_failed", saved.not_dropped, step=saved.step)

    def _count_failure(self, step: int, error: CheckpointError) -> None:
        self._failures += 1
        if self._failures > self._max_failures:
            raise CheckpointError(
                f"{error}. More than faults.max_failed_saves = {self._max_failures} in a row failed; the run ends at "
                f"step {step}, {self._lost(step)}: make space, and the same command continues from there",
                retryable=error.retryable,
            ) from error
        self._next_step = min(self._next_step, step + max(1, self._interval // _RETRY_PART))
        self._log.record("save_failed", f"{error}; the next try is at step {self._next_step}", step=step)

    def _lost(self, step: int) -> str:
        if not self._any_saved:
            return "and it has no checkpoint"
        return f"{step - self.saved_step} steps after its last checkpoint"

    def _next_regular(self, step: int) -> int:
        return (step // self._interval + 1) * self._interval

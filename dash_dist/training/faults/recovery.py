"""Recovery from a bad loss: skip batches, and roll back to a checkpoint.

Knows the verdicts of the guard, and moves the run's position; does not know how a verdict is found, nor the loop. Every
method is called at every rank.
"""

from collections.abc import Callable
from pathlib import Path

from dash_dist.config.run import RunConfig
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.protocol import StepResult
from dash_dist.errors import RunError
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.faults.fault_log import FaultLog
from dash_dist.training.faults.guard import LossGuard, Rollback
from dash_dist.training.faults.rollback import checkpoint_before
from dash_dist.training.faults.skipped import SkippedBatches, SkipRecord
from dash_dist.training.position import RunPosition
from dash_dist.training.saving import Saver

_ADVICE = (
    "lower optimizer.lr or lengthen optimizer.warmup_steps, and start another run (run.name) from an earlier "
    "checkpoint with run.resume=PATH"
)


class LossRecovery:
    """Recovery of one process of a run.

    Args:
        start: the checkpoint of another run that this one began from, with its step.
        beat: called before what may take long.
        undone: called with a step when all steps after it are undone.
    """

    def __init__(
        self,
        config: RunConfig,
        position: RunPosition,
        checkpoints: CheckpointManager,
        saver: Saver,
        control: ControlGroup,
        log: FaultLog,
        *,
        start: tuple[Path, int] | None,
        beat: Callable[[], None],
        undone: Callable[[int], None],
    ) -> None:
        self._faults = config.faults
        self._run_directory = config.run.path
        self._position = position
        self._checkpoints = checkpoints
        self._saver = saver
        self._control = control
        self._log = log
        self._start = start
        self._beat = beat
        self._undone = undone
        self._guard = LossGuard(config.faults, position.state)
        self._skipped = control.on_main("the run cannot start", RunError, lambda: SkipRecord.read(config.run.path))
        if self._skipped.batches:
            log.note(f"batches that are not trained on: see {config.run.path / SkipRecord.FILE}")

    def should_skip(self, step: int) -> bool:
        """Return whether the batch of `step` is to be skipped."""
        return step in self._skipped

    def check(self, result: StepResult) -> bool:
        """Judge the step that was just trained; return True if the run can continue from it.

        Otherwise the run is rolled back to an earlier step. Raises RunError where that cannot help. Call it before
        `RunPosition.advance_data`.
        """
        step = self._position.state.step
        rollback = self._guard.judge(step, result.loss, result.grad_norm, skipped=result.skipped)
        if rollback is not None:
            self._roll_back(rollback)
            return False
        self._position.remember(self._guard)
        if result.skipped:
            reason = f"loss {result.loss}, gradient norm {result.grad_norm}"
            self._skip(SkippedBatches(step, step, reason, self._position.data_state))
            self._log.record("batch_skipped", f"step {step} changed no weight: {reason}", step=step)
        return True

    def _roll_back(self, rollback: Rollback) -> None:
        step, limit = self._position.state.step, self._faults.max_rollbacks
        self._saver.settle(step)
        if self._skipped.rollbacks >= limit:
            raise RunError(f"{rollback.reason}, after faults.max_rollbacks = {limit} rollbacks: {_ADVICE}")
        self._beat()
        origin = checkpoint_before(self._checkpoints, self._control, rollback.newest_step, start=self._start)
        if origin is None:
            raise RunError(
                f"{rollback.reason}, and no checkpoint is of step {rollback.newest_step} or before: {_ADVICE}"
            )
        first, data_state = rollback.first, self._position.data_state
        self._beat()
        self._position.load(self._checkpoints, origin)
        self._beat()
        here = self._position.state.step
        if first is None:
            first, data_state = here + 1, self._position.data_state
        self._guard = LossGuard(self._faults, self._position.state)
        self._saver.go_back_to(here)
        self._undone(here)
        self._skipped.rollbacks += 1
        self._skip(SkippedBatches(first, rollback.last, rollback.reason, data_state))
        batches = f"the batch of step {first}" if first == rollback.last else f"the batches of steps {first} to {step}"
        self._log.record("batch_skipped", f"{batches} will not be trained on", step=step, drawn_at=here)
        self._log.record("rollback", f"{rollback.reason}; back to {origin}", step=step, drawn_at=here)

    def _skip(self, batches: SkippedBatches) -> None:
        self._skipped.batches.append(batches)
        if self._control.is_main:
            try:
                self._skipped.write(self._run_directory)
            except OSError as error:
                self._log.note(f"a restarted run will not know which batches were left out: {error}")

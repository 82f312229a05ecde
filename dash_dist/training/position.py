"""The position of a run: weights, position in the data, and counters, which only move together.

Knows the interfaces of engine and data stream, and RunState; does not know when to move nor what to log.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dash_dist.data.stream import Batch, DataStream
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.batch import BatchError
from dash_dist.engine.protocol import Engine, StepResult
from dash_dist.errors import CheckpointError, RunError
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.faults.guard import LossGuard


class RunPosition:
    """Position of one rank. All ranks move together.

    Attributes:
        state: the counters after the last step.
        schedule_before: the learning rate's schedule in the checkpoint that was loaded last; empty without one.

    Args:
        schedule: of this run, see `RunState.schedule`.
    """

    def __init__(
        self,
        engine: Engine,
        data: DataStream,
        control: ControlGroup,
        schedule: dict[str, int | float],
    ) -> None:
        self.state = RunState(schedule=schedule)
        self.schedule_before: dict[str, int | float] = {}
        self._schedule = schedule
        self._engine = engine
        self._data = data
        self._control = control
        self._data_state = data.state_dict()

    def load(self, checkpoints: CheckpointManager, origin: Path) -> tuple[list[str], list[str]]:
        """Move to a checkpoint; returns the messages of `Engine.load` and of `DataStream.load_state_dict`.

        Raises CheckpointError at every rank.
        """
        state, data_state, changes = checkpoints.load(origin, self._engine)
        with self._control.together(f"cannot continue from {origin}", CheckpointError):
            try:
                data_changes = self._data.load_state_dict(data_state)
            except (AttributeError, KeyError, TypeError) as error:
                # No stream wrote this, though its checksum is right.
                raise CheckpointError(f"{origin / 'data.json'} is not a position in data: {error!r}") from error
        own = origin.parent == checkpoints.directory
        self.schedule_before = state.schedule
        self.state = replace(state, origin=state.origin if own else str(origin), schedule=self._schedule)
        self.advance_data()
        return changes, data_changes

    def train(self, micro_batches: list[Batch]) -> StepResult:
        """Train on the next global batch. The position in the data stays before it until `advance_data` is called.

        Raises RunError at every rank for a batch that the engine refuses.
        """
        step = self.state.step + 1
        try:
            result = self._engine.train_step(micro_batches)
        except BatchError as error:
            raise RunError(f"step {step}: {error}") from error
        self.state = replace(
            self.state,
            step=step,
            tokens=self.state.tokens + self._data.step_tokens,
            first_loss=result.loss if step == 1 else self.state.first_loss,
            last_loss=result.loss,
        )
        return result

    def skip_batch(self) -> None:
        """Count the next global batch as a step without training on it.

        Step number, learning rate and position in the data advance as in `train`.
        """
        step = self.state.step + 1
        self._engine.step = step
        self.state = replace(self.state, step=step, tokens=self.state.tokens + self._data.step_tokens)
        self.advance_data()

    def remember(self, guard: LossGuard) -> None:
        """Copy the counters of `guard` into the state."""
        self.state = replace(self.state, skipped_in_a_row=guard.skipped_in_a_row, recent_losses=guard.recent_losses)

    def advance_data(self) -> None:
        """Move the position in the data behind the batch that was read last."""
        self._data_state = self._data.state_dict()

    @property
    def data_state(self) -> dict[str, Any]:
        """The position in the data, the same at every rank."""
        return self._data_state

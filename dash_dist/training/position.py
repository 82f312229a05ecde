"""The position of a run: weights, position in the data, and counters, which only move together.

Knows the interfaces of engine and data stream, and RunState; does not know when to move nor what to log.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dash_dist.config.run import Stage
from dash_dist.data.stream import Batch, DataStream
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.batch import BatchError
from dash_dist.engine.protocol import Engine, StepResult
from dash_dist.errors import CheckpointError, RunError
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.faults.guard import LossGuard
from dash_dist.training.schedule import describe_change


@dataclass(frozen=True)
class Changes:
    """Differences between a checkpoint and the run that continues from it, in words.

    Attributes:
        new_stage: the checkpoint is of another stage.
        function: settings by which the weights now compute another function.
        data: documents, sources and sizes.
        schedule: the learning rate of the next step; None for the same schedule.
    """

    new_stage: bool = False
    function: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    schedule: str | None = None


class RunPosition:
    """Position of one rank. All ranks move together.

    Attributes:
        state: the counters after the last step.
    """

    def __init__(
        self,
        engine: Engine,
        data: DataStream,
        control: ControlGroup,
        stage: Stage,
    ) -> None:
        self._stage = stage
        schedule = stage.config.optimizer.schedule(stage.last_step)
        self.state = RunState(schedule=schedule, stage=stage.name)
        self._engine = engine
        self._data = data
        self._control = control
        self._data_state = data.state_dict()

    def load(self, checkpoints: CheckpointManager, origin: Path) -> Changes:
        """Move to a checkpoint; returns how the run differs from it.

        The first checkpoint of a stage is the last one of the stage before. Its position in the data is continued as
        far as the documents are the same. Raises CheckpointError at every rank.
        """
        state, data_state, function = checkpoints.load(origin, self._engine)
        new_stage = bool(self._stage.name) and state.stage != self._stage.name
        data: list[str] = []
        if state.step >= self._stage.first_step:  # else an earlier stage goes on from here, with its own documents
            with self._control.together(f"cannot continue from {origin}", CheckpointError):
                try:
                    data = self._data.load_state_dict(data_state, new_stage=new_stage)
                except (AttributeError, KeyError, TypeError) as error:
                    # No stream wrote this, though its checksum is right.
                    raise CheckpointError(f"{origin / 'data.json'} is not a position in data: {error!r}") from error
        own = origin.parent == checkpoints.directory
        schedule, before = self.state.schedule, state.schedule
        self.state = replace(
            state, origin=state.origin if own else str(origin), schedule=schedule, stage=self._stage.name
        )
        self.advance_data()
        return Changes(new_stage, tuple(function), tuple(data), describe_change(before, schedule, state.step + 1))

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

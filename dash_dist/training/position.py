"""Where a run stands: weights, position in the data, and counters, which only move together.

Knows the engine, the data stream and RunState by what they promise; does not know when to move nor what to log.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dash_dist.data.stream import Batch, DataStream, merge_states
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.batch import BatchError
from dash_dist.engine.protocol import Engine, StepResult
from dash_dist.engine.ranks import Dims
from dash_dist.errors import CheckpointError, RunError
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.faults.guard import LossGuard


class RunPosition:
    """The position of one rank; all ranks move alike.

    Attributes:
        state: the counters after the last step.
    """

    def __init__(self, engine: Engine, data: DataStream, dims: Dims, control: ControlGroup) -> None:
        self.state = RunState()
        self._engine = engine
        self._data = data
        self._control = control
        # One rank of each data-parallel index speaks for the others, which read the same rows.
        self._speaks_for_its_rows = dims.tp_rank == dims.cp_rank == dims.pp_rank == 0
        self._in_data = data.state_dict()

    def load(self, checkpoints: CheckpointManager, origin: Path) -> list[str]:
        """Go to a checkpoint; returns what `Engine.load` says. Raises CheckpointError at every rank."""
        state, in_data, changes = checkpoints.load(origin, self._engine)
        with self._control.together(f"cannot go on from {origin}", CheckpointError):
            try:
                self._data.load_state_dict(in_data)
            except (AttributeError, KeyError, TypeError) as error:
                # Not what a stream wrote, though its checksum is right.
                raise CheckpointError(f"{origin / 'data.json'} is not a position in data: {error!r}") from error
        own = origin.parent == checkpoints.directory
        self.state = state if own else replace(state, origin=str(origin))
        self.batch_read()
        return changes

    def train(self, micro_batches: list[Batch]) -> StepResult:
        """Train on the next global batch. The position in the data stays before it until `batch_read` is called.

        Raises RunError at every rank if it makes no step.
        """
        step = self.state.step + 1
        try:
            result = self._engine.train_step(micro_batches)
        except BatchError as error:
            raise RunError(f"step {step}: {error}") from error
        self.state = replace(
            self.state,
            step=step,
            tokens=self.state.tokens + result.tokens,
            first_loss=result.loss if step == 1 else self.state.first_loss,
            last_loss=result.loss,
        )
        return result

    def pass_over(self, micro_batches: list[Batch]) -> None:
        """Count the next global batch as a step without training on it: step number, learning rate and position in the
        data stay what they would have been."""
        tokens = sum(self._control.gather(self.of_own_rows(lambda: _loss_tokens(micro_batches))))
        step = self.state.step + 1
        self._engine.step = step
        self.state = replace(self.state, step=step, tokens=self.state.tokens + tokens)
        self.batch_read()

    def remember(self, guard: LossGuard) -> None:
        """Take what `guard` has seen into the state."""
        self.state = replace(self.state, skipped_in_a_row=guard.skipped_in_a_row, recent_losses=guard.recent_losses)

    def batch_read(self) -> None:
        """The position in the data is behind the batch that was read last."""
        self._in_data = self._data.state_dict()

    def own_in_data(self) -> list[dict[str, Any]]:
        """This rank's part of the position in the data; empty at a rank that another one speaks for."""
        return [self._in_data] if self._speaks_for_its_rows else []

    def in_data(self) -> dict[str, Any]:
        """The position in the data of all rows. Called at every rank."""
        return merge_states(one for of_rank in self._control.gather(self.own_in_data()) for one in of_rank)

    def of_own_rows(self, count: Callable[[], int]) -> int:
        """`count()`, or 0 at a rank that another one speaks for: what may be added up over the ranks."""
        return count() if self._speaks_for_its_rows else 0


def _loss_tokens(micro_batches: list[Batch]) -> int:
    return sum(int(batch.loss_mask.sum()) for batch in micro_batches)

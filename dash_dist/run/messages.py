"""Messages about the progress of a run, and the interface that receives them.

Knows the numbers that a run reports; does not know how they are shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class RunStart:
    """Facts of a run before its first step.

    Attributes:
        layout: description of the parallel layout.
        start_step: steps done before.
        tokens_per_step: tokens of a global batch, padding included.
    """

    name: str
    layout: str
    start_step: int
    steps: int
    tokens_per_step: int
    resumed_from: Path | None


@dataclass(frozen=True)
class StepReport:
    """One logging interval. `density` is the mean over the layers, None until it was first recorded."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    density: float | None
    eta_seconds: float


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run.

    Attributes:
        steps: optimizer steps the run has done, those before a resume included.
        completed: False if the run was asked to stop before its last step.
        first_loss, last_loss: mean loss per token in nats at step 1 and at the last step; None for no step at all.
        tokens: tokens of all global batches so far, each counted once, without padding.
        tokens_per_second: of all ranks together, since this process started; 0.0 if it ran no step.
        density: per layer (0-based), the last recorded share of causally available chunks that were selected; empty if
            this process ran no step.
        skipped_documents: empty and undecodable documents so far, at all ranks.
        padding: share of the tokens of all global batches so far that are padding.
        tensorboard_directory, checkpoint_directory: folders of the run's curves and checkpoints.
    """

    steps: int
    completed: bool
    first_loss: float | None
    last_loss: float | None
    tokens: int
    tokens_per_second: float
    tensorboard_directory: Path
    checkpoint_directory: Path
    density: Mapping[int, float] = field(default_factory=dict)
    skipped_documents: int = 0
    padding: float = 0.0


class ProgressReporter(Protocol):
    """Receiver of a run's progress; called at rank 0 only."""

    def start(self, run: RunStart) -> None: ...

    def update(self, report: StepReport) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, summary: RunSummary) -> None: ...

    def close(self) -> None: ...

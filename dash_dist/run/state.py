"""Counters of a run, as stored in its checkpoints.

Knows steps, tokens and losses; does not know files.
"""

from dataclasses import dataclass, field

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class RunState:
    """Progress of a run.

    Attributes:
        step: optimizer steps done.
        tokens: tokens they were trained on.
        first_loss, last_loss: loss of step 1 and of the last step.
        origin: checkpoint that the run was started from (`run.resume=PATH`); None for a run from scratch.
        schedule: settings of the learning rate (`OptimizerConfig.schedule`) of the last step; empty where a checkpoint
            of an earlier version does not say.
        stage: name of the stage of the last step; empty where the run has none.
        skipped_in_a_row, recent_losses: state of the checks for bad losses.
    """

    __pydantic_config__ = STRICT

    step: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    origin: str | None = None
    schedule: dict[str, int | float] = field(default_factory=dict)
    stage: str = ""
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)

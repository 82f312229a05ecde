"""Counters of a run, as its checkpoints hold them.

Knows steps, tokens and losses; does not know files.
"""

from dataclasses import dataclass, field

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class RunState:
    """Where a run stands: `step` optimizer steps done on `tokens` tokens; `first_loss` is that of step 1.

    `origin` is the checkpoint the run was started from (`run.resume=PATH`), None for a run from scratch;
    `skipped_in_a_row` and `recent_losses` are what the watch over the losses goes on from.
    """

    __pydantic_config__ = STRICT

    step: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    origin: str | None = None
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)

"""Judgement of a step's loss, and the remedy for a bad one.

Knows losses and step numbers; does not know weights, checkpoints or data. Ranks that show it the same steps come to the
same verdicts, without asking each other.

A step whose loss or gradient norm is not finite changed no weight: its batch is passed over, and that is all, unless
there are too many in a row; then the weights are at fault, as they were before the first of them. A finite loss far
above the last ones did change weights. Going back to a checkpoint and passing over the batches around the trouble is
how PaLM was trained through its spikes (Chowdhery et al. 2022, section 5.1).
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from dash_dist.config.upkeep import FaultsSection
from dash_dist.run.state import RunState

# The median absolute deviation of a normal distribution times this is its standard deviation.
_MAD_TO_SIGMA = 1.4826

# Losses that hardly differ would make a spike of every change: the deviation is at least this part of the median.
_SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True)
class Rollback:
    """The verdict that the run must be set back.

    Attributes:
        reason: in words, with the step.
        newest_step: a checkpoint of more steps than this holds weights that are in doubt.
        first, last: steps whose batches are not to be trained on; `first` None is the first one after the checkpoint.
    """

    reason: str
    newest_step: int
    first: int | None
    last: int


class LossGuard:
    """Watches the losses of a run.

    Args:
        faults: the limits.
        state: position from which the run continues.

    Attributes:
        skipped_in_a_row: steps without a finite loss and gradient norm up to the last one.
    """

    def __init__(self, faults: FaultsSection, state: RunState) -> None:
        self._faults = faults
        self.skipped_in_a_row = state.skipped_in_a_row
        window = 0 if faults.spike_z_score is None else faults.spike_window
        self._losses: deque[float] = deque(state.recent_losses, maxlen=window)

    @property
    def recent_losses(self) -> list[float]:
        """Losses that spikes are measured against; empty without spike detection."""
        return list(self._losses)

    def judge(self, step: int, loss: float, grad_norm: float, *, skipped: bool) -> Rollback | None:
        """Take in the numbers of `step`; None if the run can go on from it.

        `skipped` says that they were not finite and that no weight changed.
        """
        if skipped:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row <= self._faults.max_skipped_steps:
                return None
            return Rollback(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; more than "
                f"faults.max_skipped_steps = {self._faults.max_skipped_steps} such steps in a row",
                # The update before the first of them made the weights that cannot be used.
                newest_step=step - self.skipped_in_a_row - 1,
                first=None,
                last=step,
            )
        self.skipped_in_a_row = 0
        score = self._score(loss)
        if score is not None and score > (limit := self._faults.spike_z_score or math.inf):
            return Rollback(
                f"step {step}: loss {loss:.4f} is {score:.1f} deviations above the median of the last "
                f"{len(self._losses)}, more than faults.spike_z_score = {limit:g}",
                newest_step=step - 1,
                first=step,
                last=step,
            )
        self._losses.append(loss)
        return None

    def _score(self, loss: float) -> float | None:
        """The robust z-score of `loss`; None until the window is full."""
        if not self._losses.maxlen or len(self._losses) < self._losses.maxlen:
            return None
        middle = median(self._losses)
        deviation = _MAD_TO_SIGMA * median(abs(one - middle) for one in self._losses)
        return (loss - middle) / max(deviation, _SMALLEST_DEVIATION * abs(middle))

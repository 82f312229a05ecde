"""The section `training:`, length and batch sizes.

Knows the allowed values; does not know the layout that they must fit.
"""

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from dash_dist.config.section import Section

Positive = Annotated[int, Field(gt=0)]


class TrainingSection(Section):
    """Length and batch sizes of the training loop.

    Attributes:
        steps: optimizer steps of the whole run.
        sequence_length: tokens of a sequence (T), before it is split over context-parallel ranks.
        global_batch_size: sequences per optimizer step, over all data-parallel ranks.
        micro_batch_size: sequences per forward pass of one data-parallel rank. Gradients are accumulated over passes.
        distributed_timeout_seconds: seconds that a rank waits for another one before the run ends.
    """

    steps: Positive
    sequence_length: Annotated[int, Field(gt=1)]
    global_batch_size: Positive = 1
    micro_batch_size: Positive = 1
    distributed_timeout_seconds: Annotated[int, Field(gt=0, le=365 * 86400)] = 1800

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, padding included."""
        return self.global_batch_size * self.sequence_length

    @property
    def distributed_timeout(self) -> timedelta:
        return timedelta(seconds=self.distributed_timeout_seconds)

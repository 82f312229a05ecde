"""The sections `checkpoint:`, `faults:` and `logging:`, which keep a run alive and visible.

Knows limits and intervals; does not know the loss, which none of them changes.
"""

from typing import Annotated

from pydantic import Field

from dash_dist.config.section import Section

Positive = Annotated[int, Field(gt=0)]


class CheckpointSection(Section):
    """Checkpoints every `interval` steps and at the end.

    Attributes:
        interval: steps between checkpoints.
        keep: number of latest checkpoints to keep.
        keep_every_hours: hours of wall time between older checkpoints that are kept permanently; None keeps none.
        asynchronous: train while a checkpoint is written. Needs host memory for the rank's part of weights and
            optimizer state, which stays allocated from the first step on.
    """

    interval: Positive = 500
    keep: Positive = 2
    keep_every_hours: Annotated[float, Field(gt=0)] | None = None
    asynchronous: bool = True


class FaultsSection(Section):
    """Limits on the faults that a run tolerates.

    Attributes:
        max_skipped_steps: consecutive skipped steps that the run tolerates before it rolls back to a checkpoint. A
            step is skipped if its loss or gradient norm is not finite: no weight changes, and its batch is dropped.
        spike_z_score: deviations above the median of the last `spike_window` losses that make a loss a spike. The run
            then rolls back to its newest checkpoint and drops the batch of that step. The deviation is the median
            absolute deviation, scaled to that of a normal distribution. None disables the search for spikes.
        spike_window: finite losses in the median. Detection starts when the window is full.
        max_rollbacks: rollbacks over all attempts; one more ends the run.
        max_failed_saves: consecutive checkpoints that cannot be written; one more ends the run.
        save_timeout_seconds: longest time to write a checkpoint in the background; a longer one counts as failed. None
            disables the limit.
        hang_timeout_seconds: longest time of a step with its data and checkpoint; a slower process writes its stacks
            and ends. Set it below training.distributed_timeout_seconds, or ranks that wait for a hung one give up
            before they write their stacks. None disables the limit.
    """

    max_skipped_steps: Positive = 10
    spike_z_score: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    spike_window: Annotated[int, Field(ge=10)] = 100
    max_rollbacks: Annotated[int, Field(ge=0)] = 5
    max_failed_saves: Annotated[int, Field(ge=0)] = 20
    save_timeout_seconds: Positive | None = 3600
    hang_timeout_seconds: Positive | None = 1200


class LoggingSection(Section):
    """Intervals of TensorBoard's content; the first and the last step of a run write all of it.

    Attributes:
        interval: steps between points of the curves, and between progress lines.
        routing_interval: steps between records of density and selected chunks, for every layer.
        heat_map_interval: steps between heat maps of the routing. A heat map computes the routing of its layer twice.
        heat_map_layers: layers to draw, counted from 0; None draws the first, the middle and the last with routing,
            () none. Drawing needs the extra `report`.
    """

    interval: Positive = 10
    routing_interval: Positive = 50
    heat_map_interval: Positive = 500
    heat_map_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None

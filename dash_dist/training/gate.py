"""The conditions at the end of a stage.

Knows thresholds and measurements; does not know how a measurement is made.
"""

from dash_dist.config.run import Stage
from dash_dist.training.telemetry.metrics import HeldOutMetrics


def missed(stage: Stage, heldout: HeldOutMetrics | None) -> str | None:
    """Return the message for a condition that the end of `stage` misses; None if it meets all.

    Args:
        heldout: the loss after the last step of the stage.
    """
    limit = stage.gate.heldout_loss
    if limit is not None and heldout is not None and not heldout.loss <= limit:
        return (
            f"stage {stage.name} ends at step {stage.last_step} with a held-out loss of {heldout.loss:.4f}, above its "
            f"gate.heldout_loss = {limit:g}; the checkpoint is kept: give the stage more steps or raise the limit, "
            "and start the run again"
        )
    return None

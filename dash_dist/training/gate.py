"""The conditions at the end of a stage.

Knows thresholds and measurements; does not know how a measurement is made.
"""

from dash_dist.config.run import Stage
from dash_dist.training.telemetry.metrics import HeldOutMetrics


def missed(stage: Stage, heldout: HeldOutMetrics | None, retrieval: float | None) -> str | None:
    """Return the message for a condition that the end of `stage` misses; None if it meets all.

    Args:
        heldout: the loss after the last step of the stage.
        retrieval: the accuracy there.
    """
    most, least = stage.gate.heldout_loss, stage.gate.retrieval
    if most is not None and heldout is not None and not heldout.loss <= most:
        found = f"a held-out loss of {heldout.loss:.4f}, above its gate.heldout_loss = {most:g}"
    elif least is not None and retrieval is not None and not retrieval >= least:
        found = f"a retrieval accuracy of {retrieval:.3f}, below its gate.retrieval = {least:g}"
    else:
        return None
    return (
        f"stage {stage.name} ends at step {stage.last_step} with {found}; the checkpoint is kept: give the stage more "
        "steps or change the limit, and start the run again"
    )

"""A change of the learning rate's schedule where a run resumes.

Knows the schedules of the checkpoint and of the run; does not know who is told.
"""

from collections.abc import Mapping

from dash_dist.megatron.optimizer import scheduled_learning_rate


def describe_change(before: Mapping[str, int | float], now: Mapping[str, int | float], step: int) -> str | None:
    """Return a message about the change of the learning rate at `step`; None if no setting of the schedule differs.

    Args:
        before: schedule of the checkpoint (`RunState.schedule`); empty if the checkpoint does not say.
        now: schedule of this run.
        step: the first one under the new schedule.
    """
    changed = {name: value for name, value in before.items() if now[name] != value}
    if not changed:
        return None
    by_default = {"decay_steps": " (by default training.steps)"}
    settings = "; ".join(
        f"optimizer.{name}{by_default.get(name, '')} was {value} and is {now[name]}" for name, value in changed.items()
    )
    remedy = " ".join(f"optimizer.{name}={value}" for name, value in changed.items())
    return (
        f"the learning rate of step {step} is {scheduled_learning_rate(now, step):.3e} instead of "
        f"{scheduled_learning_rate(before, step):.3e}: {settings}. To keep the checkpoint's curve, set {remedy}"
    )

"""Values of a run's curves, as TensorBoard's files hold them.

Knows the folder of the curves; does not know their names.
"""

from pathlib import Path

from dash_dist.errors import ConfigError


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """Return tag -> step -> value of every curve of a run. Raises ConfigError where the run has none."""
    # TensorBoard's reader takes a second to import, and few commands read curves.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "tensorboard"
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist: give the folder of a run that logged to TensorBoard")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

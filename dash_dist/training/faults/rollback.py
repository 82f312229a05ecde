"""Choice of the checkpoint that a rollback loads.

Knows the run's checkpoint folders and step numbers; does not know the reason of a rollback.
"""

from pathlib import Path

from dash_dist.checkpoints.folders import set_aside, step_of, visible_checkpoints
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import CheckpointError
from dash_dist.training.checkpoints import CheckpointManager


def checkpoint_before(
    checkpoints: CheckpointManager, control: ControlGroup, newest_step: int, *, start: tuple[Path, int] | None
) -> Path | None:
    """Return the newest whole checkpoint of at most `newest_step` steps, None without one. Called at every rank.

    Newer ones are renamed so that no run resumes from them: a crash must not bring back the undone steps. `start` is
    the checkpoint of another run, with its step, that this one began from. It serves while the run has none of its
    own. Raises CheckpointError at every rank.
    """

    def set_newer_aside() -> tuple[bool, bool]:
        found = visible_checkpoints(checkpoints.directory)
        in_doubt = [folder for folder in found if (step_of(folder) or 0) > newest_step]
        own = len(in_doubt) < len(found)
        from_start = start is not None and start[1] <= newest_step and start[0].is_dir()
        if own or from_start:
            for folder in in_doubt:
                set_aside(folder, "rolled_back")
        return own, from_start

    own, from_start = control.on_main(
        f"cannot look for checkpoints in {checkpoints.directory}", CheckpointError, set_newer_aside
    )
    if own:
        return checkpoints.resume_from("auto")
    return start[0] if start is not None and from_start else None

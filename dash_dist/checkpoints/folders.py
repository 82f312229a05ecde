"""The folders of a run's checkpoints: their names, which ones stay, and how one becomes visible or is set aside.

Knows names and times; does not know what is inside, nor ranks.

    <run directory>/checkpoints/
        step_00000010/                  visible only when complete
        .step_00000020.partial/         being written, or left behind by a killed run: never read
        .step_00000010.replaced/        the earlier checkpoint of a step, until the new one stands in its place
        .step_00000030.damaged/         set aside for inspection: never read, counted or removed
        .step_00000040.rolled_back/     whole, and set aside too: the run was rolled back to an earlier step
"""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

_STEP_FOLDER = re.compile(r"^step_(\d{8,})$")
_PARTIAL_FOLDER = re.compile(r"^\.step_\d{8,}\.partial$")
_REPLACED_FOLDER = re.compile(r"^\.(step_\d{8,})\.replaced$")
_HIDDEN_FOLDER = re.compile(r"^\.step_\d{8,}\.(partial|replaced|damaged|rolled_back)(-\d+)?$")

HIDDEN_STATES = {
    "partial": "being written, or left behind",
    "replaced": "being replaced, or left behind",
    "damaged": "set aside as damaged",
    "rolled_back": "set aside by a rollback",
}
"""Suffix of a folder that is not a complete checkpoint -> what it is, in words."""


def step_folder(step: int) -> str:
    """Name of the folder that holds the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None for a name of another form."""
    match = _STEP_FOLDER.match(folder.name)
    return int(match[1]) if match else None


def partial_folder(final: Path) -> Path:
    """Where the checkpoint that will be `final` is written."""
    return final.with_name(f".{final.name}.partial")


def visible_checkpoints(directory: Path) -> list[Path]:
    """Every checkpoint in `directory`, by step. Raises OSError."""
    try:
        found = [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(found)]


def hidden_checkpoints(directory: Path) -> list[tuple[Path, str]]:
    """Folders that are no complete checkpoint, by name, each with its key in `HIDDEN_STATES`. Raises OSError."""
    found = ((path, _HIDDEN_FOLDER.match(path.name)) for path in sorted(directory.iterdir()))
    return [(path, match[1]) for path, match in found if match]


def publish(partial: Path, final: Path) -> None:
    """Make a written checkpoint visible under its name, on disk when this returns; it replaces one of the same step.

    At every moment at least one of the two is complete, under its name or where `clean` finds it. Raises OSError.
    """
    replaced = final.with_name(f".{final.name}.replaced")
    sync_folders(partial)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    sync(final.parent)
    remove(replaced)


def clean(directory: Path) -> None:
    """Remove what a killed run left half written, and bring back what it was about to replace. Raises OSError."""
    if not directory.is_dir():
        return
    for folder in directory.iterdir():
        if _PARTIAL_FOLDER.match(folder.name):
            shutil.rmtree(folder)
        elif match := _REPLACED_FOLDER.match(folder.name):
            if folder.with_name(match[1]).exists():
                shutil.rmtree(folder)
            else:
                os.replace(folder, folder.with_name(match[1]))


def set_aside(folder: Path, why: Literal["damaged", "rolled_back"]) -> Path:
    """Rename a checkpoint so that it is never read, and return its new place. Raises OSError."""
    for number in itertools.count(1):
        place = folder.with_name(f".{folder.name}.{why}" + (f"-{number}" if number > 1 else ""))
        if not place.exists():
            os.replace(folder, place)
            sync(folder.parent)
            return place
    raise AssertionError("counting has no end")


def outdated(
    checkpoints: Sequence[tuple[Path, float | None]], *, keep: int, keep_every_hours: float | None
) -> list[Path]:
    """The checkpoints to drop.

    Args:
        checkpoints: folder and time of saving in seconds, by step; None where the time cannot be read.
        keep: the latest of them stay.
        keep_every_hours: of the others, the first stays, and then each that is at least so much later than the one
            that stayed before it; None keeps none of them.
    """
    dropped: list[Path] = []
    last: float | None = None
    for folder, saved_at in checkpoints[: max(0, len(checkpoints) - keep)]:
        stays = (
            keep_every_hours is not None
            and saved_at is not None
            and (last is None or saved_at >= last + keep_every_hours * 3600)
        )
        if stays:
            last = saved_at
        else:
            dropped.append(folder)
    return dropped


def drop(folder: Path) -> None:
    """Remove a checkpoint; renamed first: one that is only half removed must not look complete. Raises OSError."""
    doomed = partial_folder(folder)
    remove(doomed)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def create_anew(folder: Path) -> None:
    """Create an empty folder, in place of an existing one. Raises OSError."""
    remove(folder)
    folder.mkdir(parents=True)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(top: Path) -> None:
    """Return when the names in `top` and in every folder below it are on disk. Raises OSError."""
    for path in [*(path for path in top.rglob("*") if path.is_dir()), top]:
        sync(path)

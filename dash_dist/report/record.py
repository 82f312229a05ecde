"""Record of a run, read from its files: curves, pictures, events, checkpoints and configuration.

Knows where they are and reads them while the run may still write them; does not judge. What a resumed run has taken
back is left out, and of long curves a fair sample is kept, so that a run of any length fits.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dash_dist.checkpoints.folders import visible_checkpoints
from dash_dist.checkpoints.integrity import DamagedCheckpoint, read_metadata
from dash_dist.errors import RunError
from dash_dist.run.events import Event, EventLog
from dash_dist.run.profile import FILE, FOLDER, Profile, read_profile

# Points that are kept of a curve, chosen evenly over its steps as TensorBoard itself does; the last one always is.
MAX_POINTS = 2000


@dataclass(frozen=True)
class Curve:
    """`steps`, `values`, and `times` in seconds since 1970, each [points], in the order of the steps."""

    steps: np.ndarray
    values: np.ndarray
    times: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])

    @property
    def recent(self) -> np.ndarray:
        """The finite values of its last quarter, one at least if there is any."""
        tail = self.values[-max(1, len(self.values) // 4) :]
        return tail[np.isfinite(tail)]


@dataclass(frozen=True)
class Histogram:
    """`counts` of the numbers 0, 1, 2, ... at `step`."""

    step: int
    counts: np.ndarray


@dataclass(frozen=True)
class Picture:
    """A PNG of `step`."""

    step: int
    png: bytes


@dataclass(frozen=True)
class Checkpoint:
    """A complete one; `written` in seconds since 1970, `size` in bytes of all its files, `loss` None where unknown."""

    step: int
    name: str
    written: float
    size: int
    loss: float | None


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report is made of.

    Attributes:
        directory: of the run, `runs/NAME`.
        config_text: the resolved configuration as the run has saved it; "" where it did not come to that.
        config: the same, read.
        curves: tag -> curve, at least a point each.
        histograms, pictures: tag -> the last one.
        profile: of some of its steps; None where there is none.
        ended: how the last attempt ended by itself: "finished", "stopped" or "error"; None while it runs, and for ever
            if it was killed or crashed.
        last_write: newest change of the run's files, in seconds since 1970.
        read_at: when the files were read, in seconds since 1970.
    """

    directory: Path
    config_text: str
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    histograms: Mapping[str, Histogram]
    pictures: Mapping[str, Picture]
    events: Sequence[Event]
    checkpoints: Sequence[Checkpoint]
    profile: Profile | None
    ended: str | None
    last_write: float
    read_at: float

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration; None where the file lacks it."""
        settings = self.config.get(section)
        return settings.get(key) if isinstance(settings, Mapping) else None

    @property
    def steps(self) -> int | None:
        """Steps that the run is to do; None where the configuration does not say, as one that was edited may not."""
        steps = self.setting("training", "steps")
        return steps if isinstance(steps, int) else None

    def curve(self, tag: str) -> Curve | None:
        return self.curves.get(tag)

    def with_prefix(self, prefix: str) -> dict[str, Curve]:
        """The curves below `prefix/`, without it; numbered ones in order."""
        found = {
            tag.removeprefix(f"{prefix}/"): curve for tag, curve in self.curves.items() if tag.startswith(f"{prefix}/")
        }
        return dict(sorted(found.items(), key=lambda item: numbered(item[0])))

    @property
    def last_step(self) -> int:
        """The newest step that was logged, 0 before any."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)


def numbered(tag: str) -> tuple[str, int]:
    """Sorts layer_10 after layer_9."""
    name, _, number = tag.rpartition("_")
    return (name, int(number)) if number.isdigit() else (tag, -1)


def read_run(directory: Path) -> RunRecord:
    """Read the files of a run, which may be going on.

    Raises:
        RunError: the folder does not exist or is not that of a run, or a file cannot be read.
    """
    tensorboard = directory / "tensorboard"
    if not directory.is_dir():
        raise RunError(f"{directory} is not a folder: name the folder of a run, such as runs/demo")
    if not any((directory / name).exists() for name in ("config.yaml", "tensorboard", f"{FOLDER}/{FILE}")):
        raise RunError(
            f"{directory} is not the folder of a run, it has no config.yaml and no tensorboard/: name one, such as "
            f"runs/demo"
        )
    try:
        config_text, config = _read_config(directory / "config.yaml")
        curves, histograms, pictures = _read_tensorboard(tensorboard)
        events = EventLog(directory).read()
        checkpoints = [
            checkpoint
            for folder in visible_checkpoints(directory / "checkpoints")
            if (checkpoint := _read_checkpoint(folder)) is not None
        ]
        own_files = [
            directory / "config.yaml",
            *tensorboard.glob("events.*"),
            directory / "events.jsonl",
            directory / "attempt.json",
        ]
        profile = _read_profile(directory / FOLDER)
        changes = [file.stat().st_mtime for file in own_files if file.exists()]
    except OSError as error:
        raise RunError(f"cannot read the run in {directory}: {error.strerror or error}: {error.filename}") from error
    return RunRecord(
        directory=directory,
        config_text=config_text,
        config=config,
        curves=curves,
        histograms=histograms,
        pictures=pictures,
        events=events,
        checkpoints=checkpoints,
        profile=profile,
        ended=_read_end(directory / "attempt.json"),
        last_write=max([*changes, *(checkpoint.written for checkpoint in checkpoints)], default=0.0),
        read_at=time.time(),
    )


def _read_config(path: Path) -> tuple[str, Mapping[str, Any]]:
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{path} is not YAML: {error}") from error
    return text, config if isinstance(config, dict) else {}


def _read_tensorboard(
    directory: Path,
) -> tuple[dict[str, Curve], dict[str, Histogram], dict[str, Picture]]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every step that a resumed run took back
    sizes = {"scalars": MAX_POINTS, "histograms": 1, "images": 1, "tensors": 1, "compressedHistograms": 1, "audio": 1}
    events = EventAccumulator(str(directory), size_guidance=sizes)
    if any(directory.glob("events.*")):
        events.Reload()
    tags = events.Tags()
    curves = {}
    for tag in tags["scalars"]:
        points = events.Scalars(tag)
        if points:
            steps, values, times = zip(*((point.step, point.value, point.wall_time) for point in points), strict=True)
            curves[tag] = Curve(np.array(steps), np.array(values, dtype=float), np.array(times))
    histograms = {}
    for tag in tags["histograms"]:
        for last in events.Histograms(tag)[-1:]:
            counts = np.zeros(round(max(last.histogram_value.bucket_limit)) + 1)
            for limit, count in zip(last.histogram_value.bucket_limit, last.histogram_value.bucket, strict=True):
                counts[int(limit)] += count  # bucket k ends at k + 1/2
            histograms[tag] = Histogram(last.step, counts)
    pictures = {
        tag: Picture(last.step, last.encoded_image_string) for tag in tags["images"] for last in events.Images(tag)[-1:]
    }
    return curves, histograms, pictures


def _read_profile(folder: Path) -> Profile | None:
    try:
        return read_profile(folder)
    except ValueError as error:
        raise RunError(f"{error}: profile the run again, or remove the file") from error


def _read_end(attempt: Path) -> str | None:
    try:
        ended = json.loads(attempt.read_text(encoding="utf-8"))["ended"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a run of another version: its end is not known
        return None
    return ended if isinstance(ended, str) else None


def _read_checkpoint(folder: Path) -> Checkpoint | None:
    try:
        metadata = read_metadata(folder)
    except DamagedCheckpoint:  # or being removed; the run will step over it, and say so
        return None
    return Checkpoint(
        step=metadata.state.step,
        name=folder.name,
        written=metadata.saved_at,
        size=metadata.size,
        loss=metadata.state.last_loss,
    )

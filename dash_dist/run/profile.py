"""The profile of a run's steps: where the time of a step goes, as `dash-dist profile` found it.

Knows the file `profile.json` and its folder. Does not know how steps are measured, nor how a profile is shown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dash_dist.run.files import replace_json

FOLDER = "profile"
"""Folder of the profile in that of its run."""
FILE = "profile.json"


@dataclass(frozen=True)
class PartTime:
    """One part of a step. Times are of one step, and means over the ranks where nothing else is said.

    Attributes:
        seconds: time that the device spent on it. Activities that overlap share it, and a transfer has only the time in
            which nothing else ran. All parts and `Profile.gap_seconds` add up to the step.
        seconds_max: of the slowest rank.
        device_seconds: sum of the durations of its activities, overlapped or not; None for a gap.
        count: activities; None for a gap.
        flops_per_second, bytes_per_second: of the activities whose operations or bytes are known; None where they are
            less than half of `device_seconds`.
        peak_share: of the device's published peak; None where that is not known.
        names: its activities that took longest -> sum of their durations.
    """

    part: str
    title: str
    seconds: float
    seconds_max: float
    device_seconds: float | None
    count: float | None
    flops_per_second: float | None
    bytes_per_second: float | None
    peak_share: float | None
    names: Mapping[str, float]


@dataclass(frozen=True)
class Profile:
    """A few steps of a run.

    Attributes:
        run, stage: their names; without stages an empty one.
        layout, device: in words.
        ranks: of the run.
        steps: that were profiled, and as many that were timed without the profiler.
        step_seconds: of a step without the profiler.
        profiled_seconds: of a step under the profiler, which the parts add up to.
        gap_seconds, gap_seconds_max: time in which the device had nothing to do, without the gaps among the parts; mean
            and slowest rank.
        tokens_per_second_per_gpu, model_tflops_per_gpu, mfu: as in training, without the profiler.
        density: mean over the layers of kind dash, after the profiled steps; None without such layers.
        memory: name -> GiB, the fullest rank.
        traces: files of the ranks, in the same folder.
    """

    run: str
    stage: str
    layout: str
    device: str
    ranks: int
    steps: int
    step_seconds: float
    profiled_seconds: float
    gap_seconds: float
    gap_seconds_max: float
    tokens_per_second_per_gpu: float
    model_tflops_per_gpu: float
    mfu: float | None
    density: float | None
    memory: Mapping[str, float]
    parts: Sequence[PartTime]
    traces: Sequence[str]

    def write(self, folder: Path) -> None:
        """Replace the profile in `folder`. Raises OSError."""
        replace_json(folder / FILE, asdict(self))


def read_profile(folder: Path) -> Profile | None:
    """Return the profile in `folder`; None without one. Raises OSError; ValueError for a file that is not a profile."""
    path = folder / FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Profile(**{**content, "parts": [PartTime(**part) for part in content["parts"]]})
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a profile of this version: {error!r}") from error


def rows_of(profile: Profile) -> list[tuple[str, ...]]:
    """Return the table of a profile as text, its head first: the parts, the gaps between them, and the whole step."""
    step, several = profile.profiled_seconds, profile.ranks > 1
    gap = _without_rate("gaps: elsewhere", profile.gap_seconds, profile.gap_seconds_max)
    head = ("part", "ms", *(["slowest ms"] if several else []), "share", "device ms", "calls", "rate", "of peak")
    rows = [
        (
            part.title,
            _milliseconds(part.seconds),
            *([_milliseconds(part.seconds_max)] if several else []),
            f"{part.seconds / step:.1%}",
            "" if part.device_seconds is None else _milliseconds(part.device_seconds),
            "" if part.count is None else f"{part.count:,.0f}",
            _rate(part),
            "" if part.peak_share is None else f"{part.peak_share:.0%}",
        )
        for part in (*profile.parts, gap, _without_rate("step", step, step))
    ]
    return [head, *rows]


def facts_of(profile: Profile) -> dict[str, str]:
    """Return title -> text of what holds for the whole step."""
    facts = {
        "step without the profiler": f"{profile.step_seconds * 1e3:,.1f} ms",
        "step under the profiler": f"{profile.profiled_seconds * 1e3:,.1f} ms",
        "tokens/s per GPU": f"{profile.tokens_per_second_per_gpu:,.0f}",
        "model TFLOP/s per GPU": _short(profile.model_tflops_per_gpu),
    }
    if profile.mfu is not None:
        facts["MFU"] = f"{profile.mfu:.1%}"
    if profile.density is not None:
        facts["density"] = f"{profile.density:.3f}"
    return facts | {
        name.replace("_gib", "").replace("_", " "): f"{gib:.2f} GiB" for name, gib in profile.memory.items()
    }


def _without_rate(title: str, seconds: float, seconds_max: float) -> PartTime:
    return PartTime(title, title, seconds, seconds_max, None, None, None, None, None, {})


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _rate(part: PartTime) -> str:
    if part.flops_per_second is not None:
        return f"{_short(part.flops_per_second / 1e12)} TFLOP/s"
    return "" if part.bytes_per_second is None else f"{_short(part.bytes_per_second / 1e9)} GB/s"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

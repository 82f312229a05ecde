"""A trace as the parts of a step: each rank's own, and those of all ranks.

Knows activities and parts. Does not know how steps are run, nor how a table is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from dash_dist.profiling.intervals import Busy, exclusive
from dash_dist.profiling.parts import GAPS, PARTS, part_of
from dash_dist.profiling.trace import Activity, Trace
from dash_dist.run.profile import PartTime

_NAMES = 5
"""Activities that are named of every part."""
_NAME_LENGTH = 120
_LEAST_KNOWN = 0.5
"""Share of a part's time whose operations or bytes must be known."""
_MICROSECOND = 1e-6


def _from_zero() -> defaultdict[str, float]:
    return defaultdict(float)


@dataclass
class _Rate:
    """Operations or bytes, and the microseconds of the activities that have them."""

    amount: float = 0.0
    length: float = 0.0

    def add(self, amount: float | None, length: float) -> None:
        if amount is not None:
            self.amount += amount
            self.length += length


@dataclass
class RankPart:
    """One part of all profiled steps at one rank.

    Attributes:
        exclusive: microseconds of the device, see `intervals.exclusive`.
        length: sum of the activities' microseconds.
        names: microseconds by activity.
    """

    exclusive: float = 0.0
    length: float = 0.0
    count: int = 0
    flops: _Rate = field(default_factory=_Rate)
    moved: _Rate = field(default_factory=_Rate)
    names: defaultdict[str, float] = field(default_factory=_from_zero)

    def add(self, activity: Activity) -> None:
        length = activity.length
        self.length += length
        self.count += 1
        self.flops.add(activity.flops, length)
        self.moved.add(activity.moved, length)
        self.names[activity.name[:_NAME_LENGTH]] += length


@dataclass(frozen=True)
class Anatomy:
    """The parts of the steps in one rank's trace.

    Attributes:
        window: microseconds from the first step's start to the last one's end.
    """

    steps: int
    window: float
    parts: dict[str, RankPart]

    @property
    def gap(self) -> float:
        """Microseconds in which neither the device nor a range of the host had something to do."""
        return max(0.0, self.window - sum(part.exclusive for part in self.parts.values()))


@dataclass(frozen=True)
class Peaks:
    """Published peaks of a device, operations and bytes per second; None where they are not known."""

    flops: float | None = None
    bandwidth: float | None = None


def anatomy_of(trace: Trace) -> Anatomy:
    """Share the time of the steps out over their parts."""
    parts: defaultdict[str, RankPart] = defaultdict(RankPart)
    busy = []
    for activity in trace.activities:
        part = part_of(activity)
        parts[part].add(activity)
        busy += [Busy(start, end, part, activity.level) for start, end in activity.pieces]
    for key, share in exclusive(busy).items():
        parts[str(key)].exclusive = share
    start, end = trace.window
    return Anatomy(trace.steps, end - start, dict(parts))


def over_ranks(anatomies: Sequence[Anatomy], peaks: Peaks) -> list[PartTime]:
    """Return the parts that any rank has, in the order of `PARTS`."""
    return [_part_time(part, anatomies, peaks) for part in PARTS if any(part in anatomy.parts for anatomy in anatomies)]


def _part_time(part: str, anatomies: Sequence[Anatomy], peaks: Peaks) -> PartTime:
    steps = anatomies[0].steps
    of_ranks = [anatomy.parts.get(part, RankPart()) for anatomy in anatomies]
    unit = _MICROSECOND / steps
    on_device = part not in GAPS
    names = _from_zero()
    for one in of_ranks:
        for name, length in one.names.items():
            names[name] += length
    longest = sorted(names.items(), key=lambda item: -item[1])[:_NAMES]
    flops, moved = (_rate([getattr(one, kind) for one in of_ranks], of_ranks) for kind in ("flops", "moved"))
    rate, peak = (flops, peaks.flops) if flops is not None else (moved, peaks.bandwidth)
    return PartTime(
        part=part,
        title=PARTS[part],
        seconds=fmean(one.exclusive for one in of_ranks) * unit,
        seconds_max=max(one.exclusive for one in of_ranks) * unit,
        device_seconds=fmean(one.length for one in of_ranks) * unit if on_device else None,
        count=fmean(one.count for one in of_ranks) / steps if on_device else None,
        flops_per_second=flops,
        bytes_per_second=moved,
        # Copies from and to the host are bound by its link, and not by the memory.
        peak_share=None if rate is None or peak is None or part == "host_copies" else rate / peak,
        names={name: length * unit / len(of_ranks) for name, length in longest},
    )


def _rate(known: Sequence[_Rate], of_ranks: Sequence[RankPart]) -> float | None:
    """Return the amount per second, where enough of a part's time has it."""
    length = sum(one.length for one in known)
    if length == 0 or length < _LEAST_KNOWN * sum(one.length for one in of_ranks):
        return None
    return sum(one.amount for one in known) / (length * _MICROSECOND)

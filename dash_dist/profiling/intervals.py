"""Time of a device, shared out over what runs on it.

Knows intervals. Does not know what runs in them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Interval = tuple[float, float]
"""Start and end, in any unit."""
Key = TypeVar("Key", bound=Hashable)


class Busy(NamedTuple):
    """An interval in which something runs.

    Attributes:
        level: 0 for computation; what has a higher one runs beside it, as transfers do.
    """

    start: float
    end: float
    key: Hashable
    level: int = 0


def union(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Return the parts of intervals that lie in `window`, without empty ones."""
    first, last = window
    inside = ((max(start, first), min(end, last)) for start, end in intervals)
    return [(start, end) for start, end in inside if start < end]


def without(interval: Interval, holes: Sequence[Interval]) -> list[Interval]:
    """Return what is left of an interval; `holes` are sorted by their start."""
    left, (reached, end) = [], interval
    for hole_start, hole_end in holes:
        if hole_start > reached:
            left.append((reached, min(hole_start, end)))
        reached = max(reached, hole_end)
    if reached < end:
        left.append((reached, end))
    return [(start, stop) for start, stop in left if start < stop]


def exclusive(busy: Sequence[Busy]) -> dict[Hashable, float]:
    """Return the time that each key has the device for; the sum is the length of the union of all intervals.

    Those of the lowest level that overlap share their time evenly. The others have none meanwhile: their time is what
    lower levels do not hide.
    """
    # Ends come first: an interval that begins where another one ends does not overlap it.
    moments = sorted(
        (moment for one in busy for moment in ((one.start, 1, one), (one.end, -1, one)) if one.start < one.end),
        key=lambda moment: moment[:2],
    )
    shares: defaultdict[Hashable, float] = defaultdict(float)
    running: dict[int, Counter[Hashable]] = {level: Counter() for level in sorted({one.level for one in busy})}
    before = 0.0
    for time, change, one in moments:
        active = next((keys for keys in running.values() if keys), None)
        if active and time > before:
            share = (time - before) / active.total()
            for key, count in active.items():
                shares[key] += share * count
        before = time
        kind = running[one.level]
        kind[one.key] += change
        if not kind[one.key]:
            del kind[one.key]
    return dict(shares)

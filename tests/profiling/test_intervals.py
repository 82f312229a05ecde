"""Arithmetic of intervals: unions, holes, and who has the device, against a count of moments."""

import random

import pytest

from dash_dist.profiling.intervals import Busy, clipped, exclusive, union, without


def test_union_and_holes():
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5)]) == 6.0
    assert union([]) == 0.0
    assert clipped([(0, 2), (1, 9), (9, 12)], (1, 8)) == [(1, 2), (1, 8)]
    assert without((0, 10), [(2, 4), (3, 5), (9, 12)]) == [(0, 2), (5, 9)]
    assert without((0, 10), []) == [(0, 10)]
    assert without((0, 10), [(0, 10)]) == []


def test_a_level_has_only_the_time_that_lower_ones_leave():
    busy = [
        Busy(0, 10, "send", level=1),
        Busy(4, 7, "attend"),
        Busy(12, 13, "send", level=1),
        Busy(0, 20, "host", level=2),
    ]
    assert exclusive(busy) == {"send": 8.0, "attend": 3.0, "host": 9.0}


def test_computations_that_overlap_share_their_time():
    assert exclusive([Busy(0, 4, "a"), Busy(2, 6, "b")]) == {"a": 3.0, "b": 3.0}
    assert exclusive([Busy(0, 3, "a"), Busy(0, 3, "a"), Busy(0, 3, "b")]) == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_those_of_a_count_of_moments(seed):
    rng = random.Random(seed)
    busy = []
    for _ in range(rng.randrange(1, 40)):
        start = rng.randrange(100)
        busy.append(Busy(start, start + rng.randrange(0, 20), rng.choice("abc"), rng.choice([0, 0, 1, 2])))
    expected = dict.fromkeys("abc", 0.0)
    for moment in range(130):
        running = [one for one in busy if one.start <= moment < one.end]
        active = [one for one in running if one.level == min(other.level for other in running)]
        for one in active:
            expected[one.key] += 1 / len(active)
    found = exclusive(busy)
    assert {key: found.get(key, 0.0) for key in "abc"} == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(union((one.start, one.end) for one in busy))

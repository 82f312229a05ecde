"""The quick storm: eight kinds of faults, on a real cluster; and the parts that decide what is a difference."""

import json
import os
import random
import subprocess
from collections import Counter
from itertools import pairwise

import pytest
import torch

from tests.storm.compare import Difference, compare_losses
from tests.storm.errors import StormError
from tests.storm.faults import damage_checkpoint
from tests.storm.report import table, write_json
from tests.storm.run import ROOT
from tests.storm.schedule import FAULT_KINDS, QUICK_KINDS, draw_schedule
from tests.storm.storm import Result, Storm, node_environment
from tests.storm.trial import Outcome


@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_run_comes_through_the_quick_kinds_of_faults(short_folder):
    """Raises if a fault shows in the weights or losses, in no event, in a process left over, or in a hang."""
    storm = Storm(
        short_folder,
        faults=len(QUICK_KINDS),
        kinds=QUICK_KINDS,
        seed=7,
        workers=2,
        step_seconds=0.25,
        interval=3,
        fault_seconds=400,
        say=print,
    )
    result = storm.run()
    assert sorted(one.kind for one in result.outcomes) == sorted(QUICK_KINDS)
    assert result.losses.compared == result.steps == storm.schedule.steps
    assert result.weights.compared > 0
    assert set(result.events) >= {one.event for one in result.outcomes} | {"restart"}


def test_packages_on_the_path_of_the_storm_are_on_that_of_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/packages")
    first, *others = node_environment(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert first == str(ROOT)
    assert others[-1] == "/somewhere/packages"


def test_make_storm_is_the_long_one():
    done = subprocess.run(["make", "-n", "storm"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "-m tests.storm --faults 32" in done.stdout, done.stderr


def test_a_schedule_follows_from_its_seed():
    first, again, other = (draw_schedule(faults=30, seed=seed, interval=8, drain_steps=40) for seed in (1, 1, 2))
    apart = {"node_drained": 44, "killed_in_save": 20}
    assert first == again
    assert first != other
    assert len(first.faults) == 30
    assert set(FAULT_KINDS) <= set(Counter(fault.kind for fault in first.faults))
    steps = [fault.step for fault in first.faults]
    assert steps == sorted(steps)
    assert steps[0] > 16
    assert steps[-1] < first.steps
    for fault, following in pairwise(first.faults):
        assert following.step - fault.step >= apart.get(fault.kind, 4)


def test_a_schedule_has_the_kinds_that_it_is_asked_for():
    drawn = draw_schedule(faults=5, seed=1, interval=3, drain_steps=40, kinds=("killed_in_save", "nan_batch"))
    assert {fault.kind for fault in drawn.faults} == {"killed_in_save", "nan_batch"}
    assert len(drawn.faults) == 5
    assert len(QUICK_KINDS) == 8


def test_the_time_to_recover_is_told_for_each_kind(tmp_path):
    outcomes = [
        Outcome(number, kind, step=9, what="", event="restart", resumed_at=6, lost_steps=3, recovery_seconds=seconds)
        for number, (kind, seconds) in enumerate([("node_killed", 20.0), ("nan_batch", 1.0), ("node_killed", 30.0)])
    ]
    same = Difference(exact=True, relative=0.0, where="nowhere", compared=1)
    result = Result(1, 2, 0, 40, 3, outcomes, {"restart": 3}, losses=same, weights=same, storm_seconds=60.0)
    assert "| node_killed | 2 | 25.0 | 30.0 |" in table(result)
    write_json(result, tmp_path / "storm.json")
    written = json.loads((tmp_path / "storm.json").read_text())
    assert written["recovery_by_kind"]["nan_batch"] == {"count": 1, "median_seconds": 1.0, "largest_seconds": 1.0}


def test_a_damaged_file_differs_in_one_bit_or_in_length(tmp_path):
    original = bytes(range(256))
    kinds = set()
    for seed in range(20):
        path = tmp_path / "step_00000008" / "engine" / "shard"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(original)
        what = damage_checkpoint(tmp_path / "step_00000008", random.Random(seed))
        damaged = path.read_bytes()
        if "cut" in what:
            assert len(damaged) < len(original)
            assert original.startswith(damaged)
        else:
            flipped = int.from_bytes(damaged) ^ int.from_bytes(original)
            assert len(damaged) == len(original)
            assert flipped.bit_count() == 1
        kinds.add("cut" in what)
    assert kinds == {True, False}


def test_losses_that_differ_in_the_last_bit_are_told_from_equal_ones():
    nan = float("nan")
    assert compare_losses({1: 2.0, 2: nan}, {1: 2.0, 2: nan}).exact
    next_to = torch.nextafter(torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)).item()
    difference = compare_losses({1: 2.0, 2: 1.0}, {1: next_to, 2: 1.0})
    assert not difference.exact
    assert difference.where == "step 1"
    assert not compare_losses({1: nan}, {1: 2.0}).exact
    with pytest.raises(StormError, match="only one of the runs"):
        compare_losses({1: 2.0}, {1: 2.0, 2: 1.0})

"""Saves that go wrong in real engines: a writer that fails at one rank, and a rank that is killed while it saves."""

import time

import psutil
import pytest

from tests.support.ranks import run_ranks
from tests.support.runs import losses, write_config


def test_a_save_that_fails_at_one_rank_fails_at_all_and_the_next_one_succeeds(tmp_path):
    write_config(tmp_path)
    for told in run_ranks("tests.checkpoints.checkpoint_jobs:saves_that_fail", 2, tmp_path, cpu_only=True):
        for tensors, index, whole in (told[:3], told[3:]):
            assert "rank 1 could not write: File too large" in tensors
            assert "No space left on device: .metadata" in index
            assert whole == ""
    checkpoints = tmp_path / "runs" / "failing" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.slow
def test_a_rank_killed_while_it_saves_leaves_a_run_that_goes_on(tmp_path):
    config = write_config(tmp_path)
    run_ranks("tests.checkpoints.checkpoint_jobs:dies_while_it_saves", 1, config, tmp_path, cpu_only=True, dying=[0])
    checkpoints = tmp_path / "runs" / "killed" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [".step_00000004.partial", "step_00000002"]
    writer = int((tmp_path / "half_written").read_text())
    deadline = time.monotonic() + 60
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the writer outlives its rank"
        time.sleep(0.05)

    overrides = ["parallel.context=1", "training.steps=8", "checkpoint.interval=2"]
    jobs = [["run.name=killed", *overrides], ["run.name=undisturbed", *overrides]]
    (outcomes,) = run_ranks("tests.support.attempts:attempts", 1, config, jobs, cpu_only=True)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step_00000006", "step_00000008"]
    # Of the killed attempt some curves are ahead of its checkpoint; they are written again.
    assert losses(tmp_path / "runs" / "killed") == losses(tmp_path / "runs" / "undisturbed")

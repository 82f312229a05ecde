"""Runs that meet bad losses, a full disk, a node about to go, and a rank that stands still."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from dash_dist.run.events import EventLog
from dash_dist.training.faults.skipped import SkipRecord
from tests.support.ranks import run_ranks
from tests.support.runs import losses, rank_processes, read_curves, run_rank_processes, write_config

pytestmark = pytest.mark.slow

RANK = str(Path(__file__).parents[1] / "support" / "training_rank.py")
HANGING_RANK = str(Path(__file__).with_name("hanging_rank.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    write_config(folder)
    return folder


def arguments(folder):
    return folder / "tiny.yaml", folder


@pytest.fixture(scope="module")
def bad_losses(folder):
    return run_ranks(
        "tests.training.fault_jobs:runs_with_bad_losses", 2, *arguments(folder), time_limit=280, cpu_only=True
    )


@pytest.fixture(scope="module")
def other_faults(folder):
    return run_ranks(
        "tests.training.fault_jobs:runs_with_other_faults",
        2,
        folder / "tiny.yaml",
        folder,
        time_limit=280,
        cpu_only=True,
    )


def events(folder, name):
    return [(event.kind, event.step) for event in EventLog(folder / "runs" / name).read()]


def test_the_weights_are_those_of_a_run_without_the_batches_that_were_left_out(bad_losses):
    for rank in bad_losses:
        bad, without = rank["bad"], rank["without"]
        assert bad.outcome.error == without.outcome.error == ""
        # The bad batch and the row changed no weight. Back to the checkpoint of step 5, since that of step 4
        # waited for a good step; then, from the spike of step 16, to that of step 12.
        assert bad.trained == [1, 2, 3, 5, 6, *range(10, 17), *range(13, 16), 17, 18]
        assert without.trained == [1, 2, 3, 5, *range(10, 16), 17, 18]
        for weight, expected in zip(bad.weights, without.weights, strict=True):
            torch.testing.assert_close(weight, expected, rtol=0, atol=0)
        for summary in (bad.outcome.summary, without.outcome.summary):
            assert (summary.steps, summary.tokens) == (18, 18 * 512)


def test_what_was_done_is_an_event_and_a_record(folder, bad_losses):
    skipped = [("batch_skipped", step) for step in (4, 7, 8, 9)]
    assert events(folder, "bad") == [*skipped, ("rollback", 9), ("batch_skipped", 16), ("rollback", 16)]
    record = SkipRecord.read(folder / "runs" / "bad")
    assert record.rollbacks == 2
    assert {(batch.first, batch.last) for batch in record.batches} >= {(4, 4), (6, 9), (16, 16)}
    assert all(batch.position["sources"][0]["title"] == "stdlib" for batch in record.batches)
    output = bad_losses[0]["bad"].outcome.output
    assert "batch_skipped: the batches of steps 6 to 9 will not be trained on" in output
    assert "rollback: step 16: loss 100.0000" in output
    assert "not trained on: see" in bad_losses[0]["without"].outcome.output


def test_the_curves_are_those_of_the_steps_that_count(folder, bad_losses):
    curve = losses(folder / "runs" / "bad")
    assert list(curve) == [1, 2, 3, 4, 5, *range(10, 16), 17, 18]
    assert curve[15] < 10
    counts = {event.step: event.value for event in read_curves(folder / "runs" / "bad").Scalars("fault/rollback")}
    assert [counts[step] for step in (3, 10, 13, 18)] == [0, 1, 2, 2]


def test_a_rollback_that_is_not_allowed_ends_the_run_at_every_rank(bad_losses):
    for rank in bad_losses:
        error = rank["no more"].outcome.error
        assert re.match(r"RunError: step 11: loss 100\.0000 .*faults\.max_rollbacks = 0 rollbacks: lower", error)


def test_a_run_that_looks_for_spikes_can_go_back_to_its_start(bad_losses):
    for rank in bad_losses:
        assert rank["early"].trained == [*range(1, 12), *range(1, 11), 12]
        assert rank["early"].outcome.summary.completed


def test_a_notice_at_one_rank_makes_all_save_once_and_go_on(folder, other_faults):
    for rank in other_faults:
        assert rank["notice"].outcome.summary.completed
    assert events(folder, "notice") == [("preemption", 2)]
    saved = sorted(path.name for path in (folder / "runs" / "notice" / "checkpoints").iterdir())
    assert saved == ["step_00000002", "step_00000005"]


def test_a_full_disk_at_one_rank_costs_checkpoints_and_curves_but_not_the_run(folder, other_faults):
    for rank in other_faults:
        assert rank["full disk"].outcome.error == ""
        assert rank["full disk"].outcome.summary.completed
    kinds = [kind for kind, _ in events(folder, "full")]
    assert set(kinds) == {"save_failed", "metrics_failed"}
    assert kinds.count("metrics_failed") == 1
    assert events(folder, "full")[-1][1] < 10  # there was space again
    assert "step_00000010" in [path.name for path in (folder / "runs" / "full" / "checkpoints").iterdir()]


def test_a_disk_that_stays_full_ends_the_run_at_every_rank_with_what_to_do(other_faults):
    for rank in other_faults:
        error = rank["full for long"].outcome.error
        assert error.startswith("CheckpointError: cannot write checkpoint")
        assert "More than faults.max_failed_saves = 1 in a row failed" in error
        assert "it has no checkpoint: make space, and the same command" in error


def test_a_save_that_never_ends_is_given_up_and_the_next_is_whole(folder, other_faults):
    for rank in other_faults:
        assert rank["stuck save"].outcome.summary.completed
    failed, *_ = EventLog(folder / "runs" / "stuck").read()  # on a busy machine others may take as long
    assert failed.kind == "save_failed"
    assert "longer than faults.save_timeout_seconds = 3 to write" in failed.message
    saved = sorted(path.name for path in (folder / "runs" / "stuck" / "checkpoints").iterdir())
    assert "step_00000005" not in saved
    assert saved[-1] == "step_00000016"
    assert len(saved) >= 2
    assert all(name.startswith("step_") for name in saved)


def test_data_that_cannot_be_read_for_a_while_ends_the_attempt_at_every_rank_and_the_next_goes_on(folder, other_faults):
    for rank in other_faults:
        error = rank["server away"].outcome.error
        assert error == "RunError: cannot read the data: Stale file handle: part-0.parquet"
        assert rank["server back"].outcome.summary.completed
        assert rank["server back"].trained == list(range(4, 11))  # the attempt saved before it ended
    assert [kind for kind, _ in events(folder, "away")] == ["restart"]


@pytest.mark.timeout(450)
def test_a_rank_that_stands_still_ends_all_with_their_stacks_and_the_next_attempt_goes_on(folder):
    run = folder / "runs" / "hang"
    config = str(folder / "tiny.yaml")
    overrides = ["run.name=hang", "training.steps=8", "checkpoint.interval=4"]
    with rank_processes([HANGING_RANK, config, *overrides], 2) as processes:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
        assert all(process.returncode not in (0, None) for process in processes), outputs
    dumps = [(run / "hangs" / "attempt_0001" / f"rank_{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert "stand_still" in dumps[1]  # where it slept
    assert "stand_still" not in dumps[0]
    assert "in to_the_end" in dumps[0]  # where it waited
    for status, output in run_rank_processes([RANK, config, "1000", *overrides], 2, seconds=200):
        assert status == 0, output
    hang, restart = EventLog(run).read()
    assert (hang.kind, restart.kind, restart.step) == ("hang", "restart", 4)
    assert "no progress; 2 of the ranks" in hang.message
    assert "attempt 2 (2 processes) continues from" in restart.message
    assert restart.message.endswith("steps done again: 2")
    assert list(losses(run)) == list(range(1, 9))
    assert all(b.value >= a.value for a, b in itertools.pairwise(read_curves(run).Scalars("fault/restart")))

"""Decisions of the supervisor after each thing that its cluster or its workers can say."""

import errno

import pytest

from dash_dist.cluster.capacity import check_local_gpus, default_num_workers, usable_workers
from dash_dist.cluster.retries import Retries
from dash_dist.config.file import load_config
from dash_dist.errors import ConfigError, RunError
from dash_dist.run.events import EventLog
from dash_dist.run.requests import Command, Request
from dash_dist.training.faults.watchdog import hang_folder
from tests.cluster.supervised import DEATH, Case, begin_attempt
from tests.support.runs import write_config


def test_a_run_that_loses_a_worker_is_started_again_on_all(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    summary = case.supervisor.run()
    assert summary is not None
    assert summary.completed
    assert case.console.finished is summary
    assert case.cluster.sizes == [8, 8]
    assert case.events() == []
    assert any(DEATH in note and "newest checkpoint is of step 4" in note for note in case.console.notes)


@pytest.mark.parametrize(
    "cause",
    [
        "rank 3 (process 812 on 10.0.0.7) died: Worker unexpectedly exits, signal SIGKILL",
        "rank 2 (process 811 on 10.0.0.7) died: The actor died because its node has died.",
        "rank 1 (process 810 on 10.0.0.6) has not answered for 120 s: the process is stopped",
        "rank 0 (process 809 on 10.0.0.6) failed: RunError: cannot read the data: Stale file handle: part-0.parquet",
    ],
)
def test_one_line_of_the_event_log_says_why_a_run_was_started_again(tmp_path, cause):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    case.cluster.cause = cause
    case.supervisor.run()
    (event,) = case.log()
    assert (event.kind, event.step, event.attempt) == ("restart", 4, 1)
    assert event.message == f"attempt 1 (8 processes) was lost: {cause}"


def test_the_line_names_the_stacks_of_a_hang(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    stacks = hang_folder(case.cluster.run_directory, 1)
    stacks.mkdir(parents=True)
    (stacks / "rank_00003.txt").write_text("File ...")
    case.supervisor.run()
    (event,) = case.log()
    assert event.message.startswith(f"attempt 1 (8 processes) was lost: {DEATH}; no progress; 1 of the ranks")
    assert str(stacks) in event.message


def test_a_start_that_fails_is_a_restart_of_no_attempt(tmp_path):
    case = Case(tmp_path, 8, [(0, "shut out", 10), (12, "done", 10)])
    begin_attempt(case.cluster.run_directory, 8)  # of another command, which died
    case.supervisor.run()
    (event,) = case.log()
    assert (event.kind, event.attempt) == ("restart", None)
    assert event.message == f"the start of an attempt failed: {DEATH}"


def test_a_full_disk_costs_the_event_and_nothing_else(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)])
    monkeypatch.setattr(EventLog, "append", refuse)
    assert case.supervisor.run() is not None
    assert any("the event could not be written" in note for note in case.console.notes)


def test_lost_nodes_are_waited_for_and_then_done_without(tmp_path):
    """6 places are left: 4 workers is the most of them that the run can use. The wait ends by itself."""
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)], node_wait_seconds=30)
    case.at(9, "room", 6)
    case.supervisor.run()
    assert case.cluster.sizes == [8, 4]
    assert 40 < case.cluster.started_at[1] < 45
    assert case.events() == ["4 workers instead of 8, with the same global batch"]
    assert case.cluster.asked_for == [8, 0]  # an autoscaler is told, and told when it is over


def test_a_node_that_comes_back_in_time_is_used_at_once(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)], node_wait_seconds=30)
    case.at(9, "room", 4)
    case.at(20, "room", 8)
    case.supervisor.run()
    assert case.cluster.sizes == [8, 8]
    assert case.cluster.started_at[1] < 22


def test_fewer_workers_than_the_fewest_end_the_run_with_what_is_missing(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10)], min_workers=8, node_wait_seconds=30, max_failures=2)
    case.at(9, "room", 7)
    with pytest.raises(RunError, match=r"3 times in a row .*room for 7 workers and the run needs at least 8"):
        case.supervisor.run()


def test_only_failures_without_a_new_checkpoint_count(tmp_path):
    """Ten lost nodes, each after progress, and twice nothing in between."""
    attempts = [(step, "die", 10) for step in (2, 4, 4, 4, 6, 8, 10, 10, 12, 14)]
    case = Case(tmp_path, 8, [*attempts, (20, "done", 10)], max_failures=2)
    assert case.supervisor.run() is not None
    assert len(case.cluster.sizes) == 11


def test_failures_without_progress_end_the_run_after_longer_and_longer_pauses(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10), *[(4, "die", 10)] * 3], max_failures=2)
    with pytest.raises(
        RunError, match=r"3 times in a row without a new checkpoint.*max-failures 2.*rank 1 died\n.*step 4"
    ):
        case.supervisor.run()
    assert [event.kind for event in case.log()] == ["restart"] * 3 + ["failed"]
    assert "3 times in a row without a new checkpoint" in case.log()[-1].message
    assert [round(b - a - 10) for a, b in zip(case.cluster.started_at, case.cluster.started_at[1:], strict=False)] == [
        1,
        2,
        4,
    ]


def test_checkpoints_of_another_run_in_the_folder_are_no_progress(tmp_path):
    case = Case(tmp_path, 8, [(step, "shut out", 10) for step in (2, 4, 6, 8)], max_failures=2)
    with pytest.raises(RunError, match="3 times in a row without a new checkpoint"):
        case.supervisor.run()


def test_without_retries_a_failure_ends_the_run(tmp_path):
    case = Case(tmp_path, 8, [(4, "die", 10)], max_failures=0)
    with pytest.raises(RunError, match="not started again"):
        case.supervisor.run()


def test_what_cannot_be_mended_is_not_tried_again(tmp_path):
    case = Case(tmp_path, 8, [(4, "refuse", 10)])
    with pytest.raises(RunError, match=r"^lower optimizer\.lr$"):
        case.supervisor.run()
    assert case.cluster.running == []


def test_a_run_grows_when_there_is_room_for_long_enough(tmp_path):
    """From 4 to 8 workers, not before the interval, nor while the room still changes; the first attempt saves."""
    case = Case(tmp_path, 4, [(6, "done", 1000), (12, "done", 10)], node_wait_seconds=5, grow_interval_seconds=100)
    case.at(20, "room", 8)
    case.at(105, "room", 6)
    case.at(112, "room", 8)
    case.supervisor.run()
    assert case.cluster.sizes == [4, 8]
    assert 127 <= case.cluster.started_at[1] < 135
    assert case.events() == ["8 workers instead of 4, with the same global batch"]


def test_a_run_never_grows_beyond_what_it_may_have(tmp_path):
    case = Case(tmp_path, 16, [(6, "done", 1000)], num_workers=4, grow_interval_seconds=0)
    case.supervisor.run()
    assert case.cluster.sizes == [4]


def test_a_preemption_notice_is_passed_on_as_a_request_to_save(tmp_path):
    case = Case(tmp_path, 8, [(6, "die", 30), (12, "done", 10)])
    case.at(10, "notice", "node 10.0.0.7 is about to be taken away")
    case.at(29, "notice", "")
    case.supervisor.run()
    saves = {asked for asked in case.cluster.asked if asked.request is Request.SAVE}
    assert saves == {Command(Request.SAVE, "node 10.0.0.7 is about to be taken away")}
    assert case.cluster.asked[-1] == Command()  # a new attempt is not asked for what the last one was


def test_a_node_lost_while_workers_are_placed_is_no_failure(tmp_path):
    case = Case(tmp_path, 8, [(12, "done", 10)], max_failures=0)
    case.cluster.lost_while_placing = 3
    case.supervisor.run()
    assert case.cluster.sizes == [8]


def test_asked_to_stop_the_run_saves_and_is_not_started_again(tmp_path):
    case = Case(tmp_path, 8, [(6, "done", 1000)])
    case.at(20, "stop", True, of_cluster=False)
    summary = case.supervisor.run()
    assert summary is not None
    assert not summary.completed
    assert case.cluster.asked[-1].request is Request.STOP


def test_asked_to_stop_while_it_waits_for_nodes_it_ends(tmp_path):
    case = Case(tmp_path, 1, [])
    case.at(20, "stop", True, of_cluster=False)
    assert case.supervisor.run() is None
    assert case.clock.now < 21


@pytest.mark.parametrize(("room", "workers"), [(0, 0), (1, 0), (2, 2), (3, 2), (6, 4), (9, 8), (15, 8), (1000, 16)])
def test_the_number_of_workers_divides_the_global_batch(tmp_path, room, workers):
    """Two context-parallel ranks, and eight sequences a step for at most eight data-parallel replicas."""
    assert usable_workers(load_config(write_config(tmp_path), ["training.global_batch_size=8"]), room) == workers


@pytest.mark.parametrize(("gpus", "workers"), [(0, 2), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_the_default_number_of_workers_is_what_the_run_can_use(tmp_path, gpus, workers):
    assert default_num_workers(load_config(write_config(tmp_path)), gpus) == workers


def test_too_few_gpus_for_one_replica_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"1 GPUs.* = 2: lower one"):
        default_num_workers(load_config(write_config(tmp_path)), 1)


def test_more_workers_than_this_machine_has_gpus_are_refused():
    check_local_gpus(2, 2)
    check_local_gpus(2, 0)  # CPU workers
    with pytest.raises(ConfigError, match=r"--num-workers 3: .* this machine has 2"):
        check_local_gpus(3, 2)


def test_pauses_grow_to_a_minute():
    retries = Retries(10, saved_step=5)
    assert [retries.pause_after_failure(5) for _ in range(7)] == [2, 4, 8, 16, 32, 60, 60]
    assert retries.pause_after_failure(6) == 1


def test_progress_after_a_damaged_checkpoint_was_set_aside_counts():
    retries = Retries(1, saved_step=0)
    assert [retries.pause_after_failure(step) for step in (12, 8, 10, 10, 10)] == [1, 2, 1, 2, None]


@pytest.mark.parametrize(("saved", "resume"), [(0, "auto"), (4, "never")])
def test_a_run_that_must_not_resume_goes_on_only_from_what_is_its_own(tmp_path, saved, resume):
    case = Case(tmp_path, 8, [(4, "die", 10), (12, "done", 10)], resume="never", saved=saved)
    case.supervisor.run()
    assert [job.config.run.resume for job in case.cluster.jobs] == [resume, resume]

"""The parts that keep a run going: what is told of a fault, which saves are tried again, which attempt this is."""

import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dash_dist.cluster.failures import FailureLog
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import CheckpointError, RunError
from dash_dist.run.events import EventLog
from dash_dist.run.requests import Command, Request, RequestsOfRank
from dash_dist.run.state import RunState
from dash_dist.training import saving
from dash_dist.training.checkpoints import Saved
from dash_dist.training.faults.attempt import begin_attempt
from dash_dist.training.faults.fault_log import FaultLog
from dash_dist.training.faults.skipped import SkippedBatches, SkipRecord
from dash_dist.training.faults.watchdog import hang_folder
from dash_dist.training.saving import Saver
from dash_dist.training.telemetry import curves as curves_module
from dash_dist.training.telemetry.curves import Curves
from tests.support.runs import read_curves

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Notes(list):
    """The ProgressReporter that keeps its notes."""

    note = list.append


@pytest.fixture
def log(tmp_path):
    return FaultLog(tmp_path, Notes(), is_main=True)


@pytest.fixture
def control():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ControlGroup(timedelta(seconds=30))
    dist.destroy_process_group()


def scalars(folder, tag):
    return [(event.step, event.value) for event in read_curves(folder).Scalars(tag)]


def curves_in(folder, on_failure):
    def describe(writer):
        writer.faults(0, {"described": 1}, [])

    return Curves(folder / "tensorboard", start_step=0, describe=describe, on_failure=on_failure)


# Events


def test_events_are_counted_over_all_attempts_and_all_writers(tmp_path, log):
    EventLog(tmp_path).append("restart", "of an earlier attempt")
    log.curves = curves_in(tmp_path, pytest.fail)
    log.draw(1)
    log.record("save_failed", "the disk is full", step=2)
    EventLog(tmp_path).append("restart", "told by the launcher")
    log.draw(3)
    log.curves.close()
    assert scalars(tmp_path, "fault/restart") == [(1, 1), (2, 1), (3, 2)]
    assert scalars(tmp_path, "fault/save_failed") == [(1, 0), (2, 1), (3, 1)]
    (text,) = read_curves(tmp_path).Tensors("fault/save_failed/text_summary")
    assert text.tensor_proto.string_val == [b"the disk is full"]


def test_an_event_that_the_disk_refuses_is_counted_and_written_later(tmp_path, log, monkeypatch):
    def refuse(*args, **kwargs):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "append", refuse)
        log.record("save_failed", "first", step=2)
        log.record("save_failed", "second", step=3)
        assert log._count()["save_failed"] == 2
    assert EventLog(tmp_path).read() == []
    log.draw(4)
    assert [(event.message, event.step) for event in EventLog(tmp_path).read()] == [("first", 2), ("second", 3)]
    assert log._count()["save_failed"] == 2


def test_ranks_that_do_not_print_tell_nothing(tmp_path):
    silent = FaultLog(tmp_path, Notes(), is_main=False)
    silent.record("hang", "told by rank 0", step=1)
    silent.draw(1)
    assert not list(tmp_path.iterdir())


# Curves


def test_curves_go_on_in_a_new_file_when_the_disk_takes_them_again(tmp_path, monkeypatch):
    failures = []
    curves = curves_in(tmp_path, failures.append)

    def draw(step):
        curves.write(step, lambda writer: writer.faults(step, {"hang": step}, []))

    def refuse(writer):
        raise FULL

    draw(1)
    curves.write(2, refuse)
    draw(3)  # too early to try again
    assert len(failures) == 1
    assert "No space left on device" in failures[0]
    monkeypatch.setattr(curves_module, "_RETRY_SECONDS", 0.0)
    curves.write(4, refuse)
    assert len(failures) == 1  # still the same failure
    draw(5)
    curves.close()
    assert scalars(tmp_path, "fault/hang") == [(1, 1), (5, 5)]
    assert scalars(tmp_path, "fault/described") == [(0, 1)] * 3  # each file by itself


def test_curves_of_undone_steps_are_purged(tmp_path):
    curves = curves_in(tmp_path, pytest.fail)
    for step in (1, 2, 3):
        curves.write(step, lambda writer, step=step: writer.faults(step, {"hang": step}, []))
    curves.restart(1)
    curves.write(2, lambda writer: writer.faults(2, {"hang": 7}, []))
    curves.close()
    assert scalars(tmp_path, "fault/hang") == [(1, 1), (2, 7)]
    assert len(scalars(tmp_path, "fault/described")) == 2


def test_a_folder_that_cannot_be_made_is_told_once_and_ends_nothing(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    failures = []
    curves = curves_in(tmp_path, failures.append)
    curves.write(1, lambda writer: writer.faults(1, {"hang": 1}, []))
    curves.close()
    assert len(failures) == 1


# Saves


class Checkpoints:
    """A CheckpointManager whose saves fail while `broken` is set, and take one `finish` to complete."""

    def __init__(self):
        self.broken = False
        self.not_dropped = ""
        self.pending = False
        self.done = []

    def start(self, state, engine, data_state):
        self.pending, self._step = True, state.step

    def writing(self):
        return self.pending

    def abandon(self):
        self.pending = False

    def finish(self):
        if not self.pending:
            return None
        self.pending = False
        if self.broken:
            raise CheckpointError("no space")
        self.done.append(self._step)
        return Saved(self._step, Path(), blocked_seconds=0.1, seconds=1.0, not_dropped=self.not_dropped)


def saver(log, checkpoints, *, interval=20, max_failures=2, saved_step=0):
    return Saver(
        checkpoints,
        None,
        log,
        lambda: None,
        interval=interval,
        max_failures=max_failures,
        time_limit=60,
        saved_step=saved_step,
    )


def steps(one, first, last, *, still_writing=False, **state):
    """What the loop does with a Saver."""
    for step in range(first, last + 1):
        one.poll(step - 1, any_writing=still_writing, any_overdue=one.is_overdue())
        if one.is_due(RunState(step=step, **state)):
            one.start(RunState(step=step, **state), {})


def test_a_failed_save_is_tried_again_soon_and_then_at_the_usual_steps(tmp_path, log):
    checkpoints = Checkpoints()
    one = saver(log, checkpoints)
    checkpoints.broken = True
    steps(one, 1, 22)  # that of step 20 failed, noticed at step 20, next try at step 22
    checkpoints.broken = False
    steps(one, 23, 45)
    assert checkpoints.done == [22, 40]
    (event,) = EventLog(tmp_path).read()
    assert (event.kind, event.step) == ("save_failed", 20)
    assert event.message == "no space; the next try is at step 22"
    assert one.saved_step == 40


def test_too_many_failures_in_a_row_end_the_run(log):
    checkpoints = Checkpoints()
    one = saver(log, checkpoints, saved_step=100)
    checkpoints.broken = True
    message = r"no space\. More than faults\.max_failed_saves = 2 in a row .* at step 124, 24 steps after its last"
    with pytest.raises(CheckpointError, match=message):
        steps(one, 101, 200)


def test_success_forgives_earlier_failures(log):
    checkpoints = Checkpoints()
    one = saver(log, checkpoints)
    for regular in (20, 40, 60):
        steps(one, regular - 16, regular)
        checkpoints.broken = True
        steps(one, regular + 1, regular + 3)  # two failures, as many as are allowed
        checkpoints.broken = False
    steps(one, 64, 65)
    assert checkpoints.done == [24, 44, 64]


def test_no_checkpoint_is_started_beside_another_nor_within_a_row_of_bad_steps(log):
    checkpoints = Checkpoints()
    one = saver(log, checkpoints)
    steps(one, 1, 45, still_writing=True)
    assert (checkpoints.pending, checkpoints.done) == (True, [])
    steps(one, 46, 46)  # the one of step 20 is complete, and that of step 40 overdue
    assert checkpoints.done == [20]
    steps(one, 47, 65, skipped_in_a_row=1)
    assert checkpoints.done == [20, 46]
    steps(one, 66, 67)
    assert checkpoints.done == [20, 46, 66]


def test_the_last_checkpoint_is_tried_several_times(tmp_path, log, monkeypatch):
    checkpoints, pauses = Checkpoints(), []
    one = saver(log, checkpoints, saved_step=60)

    def wait(seconds):
        pauses.append(seconds)
        checkpoints.broken = len(pauses) < 2

    monkeypatch.setattr(saving.time, "sleep", wait)
    checkpoints.broken = True
    one.save_at_the_end(RunState(step=64), {})
    assert checkpoints.done == [64]
    assert [event.kind for event in EventLog(tmp_path).read()] == ["save_failed"] * 2

    one, checkpoints.broken = saver(log, checkpoints, saved_step=60), True
    monkeypatch.setattr(saving.time, "sleep", pauses.append)
    with pytest.raises(CheckpointError, match=r"no space\. The run ends at step 64, 4 steps after its last checkpoint"):
        one.save_at_the_end(RunState(step=64), {})


def test_what_is_saved_already_is_not_saved_again(log):
    checkpoints = Checkpoints()
    one = saver(log, checkpoints)
    steps(one, 1, 20)
    one.save_now(RunState(step=20), {})
    one.save_now(RunState(step=20), {})
    one.save_at_the_end(RunState(step=20), {})
    assert checkpoints.done == [20]


def test_a_save_that_never_ends_is_given_up_and_tried_again(tmp_path, log, monkeypatch):
    checkpoints, now = Checkpoints(), 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    one = saver(log, checkpoints)
    steps(one, 1, 30, still_writing=True)
    now += 60.0
    steps(one, 31, 32, still_writing=True)
    assert checkpoints.pending
    now += 0.1
    steps(one, 33, 33, still_writing=True)  # noticed after step 32, and tried again two steps later
    assert not checkpoints.pending
    steps(one, 34, 35)
    assert checkpoints.done == [34]
    (event,) = EventLog(tmp_path).read()
    assert (event.kind, event.step) == ("save_failed", 32)
    assert "longer than faults.save_timeout_seconds = 60 to write" in event.message


def test_older_checkpoints_that_cannot_be_removed_are_told_of_and_cost_nothing_else(tmp_path, log):
    checkpoints = Checkpoints()
    checkpoints.not_dropped = "step_00000020 cannot be removed"
    one = saver(log, checkpoints)
    steps(one, 1, 41)
    assert (checkpoints.done, one.saved_step) == ([20, 40], 40)
    events = EventLog(tmp_path).read()
    assert [(event.kind, event.message) for event in events] == [("save_failed", checkpoints.not_dropped)] * 2


@pytest.mark.parametrize(
    ("saved_step", "lost"), [(None, "and it has no checkpoint"), (0, "3 steps after its last checkpoint")]
)
def test_what_is_lost_counts_from_the_last_checkpoint_that_of_step_0_included(log, monkeypatch, saved_step, lost):
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: None)
    checkpoints = Checkpoints()
    checkpoints.broken = True
    with pytest.raises(CheckpointError, match=f"The run ends at step 3, {lost}"):
        saver(log, checkpoints, saved_step=saved_step).save_at_the_end(RunState(step=3), {})


# Attempts


def attempt(tmp_path, control, log, origin=None):
    return begin_attempt(tmp_path, control, log, origin)


def test_an_attempt_that_did_not_end_by_itself_is_told_by_the_next(tmp_path, control, log):
    with attempt(tmp_path, control, log) as first:
        first.reached(57)
        first.completed(60, stopped=False)
    second = attempt(tmp_path, control, log)
    second.reached(64)  # and is killed
    dumps = hang_folder(tmp_path, second.number)
    dumps.mkdir(parents=True)
    (dumps / "rank_00001.txt").write_text("File ...")
    assert EventLog(tmp_path).read() == []
    origin = tmp_path / "checkpoints" / "step_00000060"
    third = attempt(tmp_path, control, log, origin)
    hang, restart = EventLog(tmp_path).read()
    assert (hang.kind, hang.step) == ("hang", 64)
    assert str(dumps) in hang.message
    assert (restart.kind, restart.step) == ("restart", 60)
    assert "attempt 2 (1 processes" in restart.message
    assert restart.message.endswith(f"attempt 3 (1 processes) continues from {origin}; steps done again: 4")
    # Killed before its first step, it has still lost those four.
    fourth = attempt(tmp_path, control, log, origin)
    assert (third.number, fourth.number) == (3, 4)
    assert EventLog(tmp_path).read()[-1].message.endswith("steps done again: 4")


def test_a_loss_that_the_supervisor_recorded_is_not_recorded_again(tmp_path, control, log):
    first = attempt(tmp_path, control, log)
    first.reached(64)  # and is killed
    failures = FailureLog(tmp_path, pytest.fail)
    failures.restart("rank 1 died")
    origin = tmp_path / "checkpoints" / "step_00000060"
    attempt(tmp_path, control, log, origin)
    restart, resumed = EventLog(tmp_path).read()
    assert (restart.kind, restart.attempt) == ("restart", 1)
    assert (resumed.kind, resumed.step) == ("resumed", 60)
    assert resumed.message == f"attempt 2 (1 processes) continues from {origin}; steps done again: 4"
    log.curves = curves_in(tmp_path, pytest.fail)
    log.draw(61)
    log.curves.close()
    assert scalars(tmp_path, "fault/restart") == [(61, 1)]
    (text,) = read_curves(tmp_path).Tensors("fault/restart/text_summary")
    assert text.tensor_proto.string_val == [b"attempt 1 (1 processes) was lost: rank 1 died"]
    attempt(tmp_path, control, log)  # the second was lost together with its supervisor
    assert [event.kind for event in EventLog(tmp_path).read()] == ["restart", "resumed", "restart"]


def test_an_error_that_says_what_to_change_is_an_end_by_itself(tmp_path, control, log):
    with pytest.raises(RunError), attempt(tmp_path, control, log):
        raise RunError("lower optimizer.lr")
    assert attempt(tmp_path, control, log).number == 2
    assert EventLog(tmp_path).read() == []


def test_a_retryable_error_is_no_end_and_the_next_attempt_tells_of_it(tmp_path, control, log):
    with pytest.raises(RunError), attempt(tmp_path, control, log):
        raise RunError("the file server does not answer", retryable=True)
    attempt(tmp_path, control, log)
    assert [event.kind for event in EventLog(tmp_path).read()] == ["restart"]


# Requests and skipped batches


def test_a_reason_to_save_is_heeded_once_at_every_rank():
    notice = Command(Request.SAVE, "node a goes")
    asked = [RequestsOfRank(lambda: notice, lambda: False), RequestsOfRank(Command, lambda: False)]
    polled = [one.poll() for one in asked]
    assert [one.heed([*polled, notice]) for one in asked] == [["node a goes"]] * 2
    assert asked[0].poll() == Command()
    assert asked[1].heed([notice, Command(Request.SAVE, "node b goes")]) == ["node b goes"]


def test_a_signal_stops_whatever_else_is_asked():
    asked = RequestsOfRank(lambda: Command(Request.SAVE, "node a goes"), lambda: True)
    assert asked.poll().request is Request.STOP


def test_skipped_batches_are_read_back(tmp_path):
    assert SkipRecord.read(tmp_path).batches == []
    record = SkipRecord(1, [SkippedBatches(3, 5, "rollback", {"rows": {}}), SkippedBatches(9, 9, "loss nan")])
    record.write(tmp_path)
    again = SkipRecord.read(tmp_path)
    assert (again.rollbacks, again.batches) == (1, record.batches)
    assert [step for step in range(1, 12) if step in again] == [3, 4, 5, 9]


@pytest.mark.parametrize("text", ["{", "[]", '{"rollbacks": 0, "batches": [{"step": 3}]}'])
def test_a_damaged_record_is_refused_in_words(tmp_path, text):
    Path(tmp_path / SkipRecord.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"skipped_batches\.json is damaged .*remove it"):
        SkipRecord.read(tmp_path)

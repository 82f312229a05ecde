"""Which errors may pass when a run is tried again, and where those that will not are recorded."""

import errno
import os
import pickle
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dash_dist.cluster.rank import result_of
from dash_dist.errors import CheckpointError, ConfigError, RankError, RunError, retryable
from dash_dist.run.attempts import AttemptRecord, last_attempt
from dash_dist.run.events import EventLog
from dash_dist.training.faults.lock import RunLock
from dash_dist.training.faults.permanent import permanent_failures_recorded


class AnswerError(OSError):
    """As those of HTTP libraries: with the answer, without an errno."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status)


def of(number):
    return OSError(number, os.strerror(number), "data/part-0.parquet")


@pytest.mark.parametrize(
    "error",
    [of(errno.ESTALE), of(errno.EIO), of(errno.ETIMEDOUT), of(errno.ECONNRESET), AnswerError(503), AnswerError(429)]
    + [TimeoutError("read"), socket.gaierror(socket.EAI_AGAIN, "try again"), CheckpointError("x", retryable=True)],
    ids=repr,
)
def test_storage_or_a_server_that_does_not_answer_may_answer_later(error):
    assert retryable(error)


@pytest.mark.parametrize(
    "error",
    [of(errno.ENOENT), of(errno.EACCES), of(errno.ENOSPC), of(errno.EFBIG), AnswerError(404), AnswerError(401)]
    + [ValueError("row 3 is not JSON"), OSError("no such model"), RunError("x"), KeyError("text")]
    + [socket.gaierror(socket.EAI_NONAME, "no such host")],
    ids=repr,
)
def test_what_a_person_must_mend_does_not_pass(error):
    assert not retryable(error)


def test_the_errors_that_led_to_one_count():
    def wrapped(cause, *, hidden=False):
        try:
            try:
                raise cause
            except Exception as error:
                raise ValueError("cannot read row group 3") from (None if hidden else error)
        except ValueError as error:
            return error

    assert retryable(wrapped(of(errno.ESTALE)))
    assert not retryable(wrapped(of(errno.ESTALE), hidden=True))
    assert not retryable(wrapped(of(errno.ENOENT)))
    itself = ValueError("raised from itself")
    itself.__cause__ = itself
    assert not retryable(itself)


def test_an_error_keeps_it_from_process_to_process():
    for passes in (True, False):
        error = pickle.loads(pickle.dumps(CheckpointError("no answer", retryable=passes)))
        assert (str(error), error.retryable) == ("no answer", passes)


def test_a_rank_gives_the_run_up_only_for_what_will_not_pass():
    def refuse(error):
        raise error

    refusal = RunError("lower optimizer.lr")
    assert result_of(lambda: refuse(refusal)).refusal is refusal
    with pytest.raises(RunError, match="no answer"):
        result_of(lambda: refuse(RunError("no answer", retryable=True)))


@pytest.mark.parametrize(
    ("error", "told"),
    [(ConfigError("x"), True), (RunError("x"), True), (RunError("x", retryable=True), False), (KeyError("x"), False)],
    ids=repr,
)
def test_the_event_log_tells_of_what_will_not_pass(tmp_path, monkeypatch, error, told):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(type(error)), permanent_failures_recorded(tmp_path):
            raise error
    assert [(event.kind, event.message) for event in EventLog(tmp_path).read()] == [("failed", "x")] * told


def test_a_rank_that_fails_alone_notes_the_end_of_the_attempt(tmp_path, monkeypatch):
    """Otherwise the next start takes the attempt for one that was killed, and tells of a restart."""
    monkeypatch.setenv("RANK", "1")
    running = AttemptRecord(2, 0.0, "host", 1, 2, step=7)
    running.write(tmp_path)
    with pytest.raises(RankError), permanent_failures_recorded(tmp_path):
        raise RankError("no memory")
    assert [(event.kind, event.message) for event in EventLog(tmp_path).read()] == [("failed", "no memory")]
    assert last_attempt(tmp_path) == replace(running, ended="error")


def test_a_second_run_in_a_folder_leaves_nothing_in_the_log_of_the_first(tmp_path):
    with RunLock(tmp_path, pytest.fail), pytest.raises(ConfigError), permanent_failures_recorded(tmp_path):
        raise ConfigError("x")
    assert EventLog(tmp_path).read() == []


def test_a_refused_run_makes_no_folder(tmp_path):
    with pytest.raises(ConfigError), permanent_failures_recorded(tmp_path / "run"):
        raise ConfigError("x")
    assert not (tmp_path / "run").exists()

"""Two runs in one folder: the second is refused, and a lost one stands in nobody's way."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dash_dist.errors import RunError
from dash_dist.training.faults.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from dash_dist.training.faults.lock import RunLock
with RunLock(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(300)
"""


def lock(folder, *, patience=0.0):
    return RunLock(folder, pytest.fail, patience=patience)


@pytest.fixture
def holder(tmp_path):
    """Another process that keeps the lock of `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_in_words_that_name_the_first(tmp_path, holder):
    with pytest.raises(RunError, match=rf"process {holder.pid} on .* is running in {tmp_path}.*run\.name") as refusal:
        lock(tmp_path).__enter__()
    assert refusal.value.retryable  # the first may be about to end


def test_a_killed_run_holds_nothing_and_is_waited_for(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(RunError):
        lock(tmp_path).__enter__()
    holder.kill()
    with lock(tmp_path, patience=30):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    with lock(tmp_path):
        pass


def test_a_forked_process_does_not_keep_the_lock_of_a_run_that_ended(tmp_path):
    with lock(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(300)
            os._exit(0)
    try:
        with lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    notes = []
    with RunLock(tmp_path, notes.append):
        pass
    assert len(notes) == 1
    assert notes[0].endswith("run.lock cannot be locked (No locks available): do not start this run twice")

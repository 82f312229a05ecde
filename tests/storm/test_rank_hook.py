"""The hook of the storm inside the ranks: functions that it wraps, and requests that a rank obeys."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import get_args

import psutil
import pytest
import torch

from tests.storm.rank_hook import sitecustomize
from tests.storm.rank_hook.sitecustomize import PARTS, wrap_part
from tests.storm.requests import Part, RankRequests
from tests.storm.run import ROOT
from tests.storm.storm import node_environment
from tests.storm.trial import KILLED_IN, OUT_OF_MEMORY_IN


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Provide a class whose `do` doubles a tensor, and fails on request in rank 1's forward, backward or optimizer."""

    class Work:
        def do(self, number: torch.Tensor) -> torch.Tensor:
            return 2 * number

    monkeypatch.setenv("RANK", "1")
    for part in ("forward", "backward", "optimizer"):
        wrap_part(part, Work, "do", tmp_path)
    return Work()


def test_every_part_of_a_step_has_its_function():
    assert set(PARTS) == set(get_args(Part)) == {*KILLED_IN.values(), *OUT_OF_MEMORY_IN.values()}
    for module, owner, method in PARTS.values():
        assert callable(getattr(getattr(importlib.import_module(module), owner), method))


def test_a_rank_of_the_storm_imports_wrapped_functions(tmp_path):
    settings = tmp_path / "ranks.json"
    settings.write_text(json.dumps({"folder": str(tmp_path), "step_seconds": 0.0, "poisoned": []}))
    program = "import importlib\n" + "".join(
        f"assert hasattr(importlib.import_module({module!r}).{owner}.{method}, '__wrapped__')\n"
        for module, owner, method in [*PARTS.values(), (sitecustomize._ENGINE, "MegatronEngine", "train_step")]
    )
    environment = {**os.environ, **node_environment(settings)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_only_the_rank_that_is_asked_obeys_and_once(tmp_path, work):
    requests = RankRequests(tmp_path)
    two = torch.full((), 2.0)
    requests.ask(0, "forward", "out_of_memory")
    assert work.do(two) == 4
    assert requests.obeyed_at() is None
    before = time.time()
    requests.ask(1, "optimizer", "out_of_memory")
    with pytest.raises(torch.OutOfMemoryError, match="in optimizer"):
        work.do(two)
    assert before <= requests.obeyed_at() <= time.time()
    assert work.do(two) == 4
    requests.ask(0, "forward", "killed")
    assert requests.obeyed_at() is None


def test_memory_ends_in_the_backward_pass(tmp_path, work):
    requests = RankRequests(tmp_path)
    requests.ask(1, "backward", "out_of_memory")
    output = work.do(torch.full((), 2.0, requires_grad=True))
    assert requests.obeyed_at() is None
    with pytest.raises(torch.OutOfMemoryError, match="in backward"):
        output.backward()
    assert requests.obeyed_at() is not None


def test_a_writer_kills_its_rank_and_not_itself(tmp_path):
    """A checkpoint is written by a forked copy of the rank, whose parent it then is."""
    program = f"""
import os
from pathlib import Path
from tests.storm.rank_hook.sitecustomize import wrap_part

class File:
    def checksum(self):
        return 0

wrap_part("save", File, "checksum", Path({str(tmp_path)!r}))
if os.fork() == 0:
    print(os.getpid(), flush=True)
    File().checksum()
    os._exit(0)
os.wait()
"""
    RankRequests(tmp_path).ask(3, "save", "killed")
    environment = {**os.environ, "RANK": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        writer = int(rank.stdout.readline())
        try:
            assert rank.wait(timeout=60) == -signal.SIGKILL
            assert RankRequests(tmp_path).obeyed_at() is not None
            assert psutil.pid_exists(writer)
        finally:
            os.kill(writer, signal.SIGKILL)

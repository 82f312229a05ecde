"""Work in a forked copy of the process: its results and failures, and that it does not outlive the process."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from dash_dist.checkpoints import background
from dash_dist.checkpoints.background import FinishedCall, ForkedCall
from dash_dist.megatron.checkpoint import MegatronSave


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


def wait_until_done(call: ForkedCall) -> None:
    deadline = time.monotonic() + 60
    while not call.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children() -> set[psutil.Process]:
    """Of this process, which may have others of earlier tests."""
    return set(psutil.Process().children())


def test_the_copy_sees_memory_as_it_was() -> None:
    values = list(range(100_000))
    call = ForkedCall(lambda: (time.sleep(0.2), sum(values))[1])
    values.clear()
    wait_until_done(call)
    assert call.result() == sum(range(100_000))


@pytest.mark.parametrize("kind", [ForkedCall, FinishedCall])
def test_what_the_function_raises_is_raised(kind: type[ForkedCall] | type[FinishedCall]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    call = kind(full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        call.result()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/somewhere")
    with pytest.raises(OSError, match="ZeroDivisionError"):
        kind(lambda: 1 // 0).result()


@pytest.mark.parametrize("stuck", [1, 3])
def test_a_copy_that_never_begins_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stuck: int) -> None:
    """One forked while another thread held the interpreter's lock. After the last of them, the function runs here."""
    run = background._run

    def begin_later(*arguments: Any) -> None:
        with (tmp_path / "forks").open("a") as forks:
            forks.write("fork\n")
        if len((tmp_path / "forks").read_text().split()) <= stuck:
            time.sleep(600)
        run(*arguments)

    monkeypatch.setattr(background, "_run", begin_later)
    monkeypatch.setattr(background, "_BEGIN_SECONDS", 2.0)
    before = children()
    call = ForkedCall(os.getpid)
    wait_until_done(call)
    assert (call.result() == os.getpid()) == (stuck == 3)
    assert children() <= before


def test_a_copy_that_is_killed_is_an_error() -> None:
    call: ForkedCall = ForkedCall(lambda: os.kill(os.getpid(), signal.SIGKILL))
    wait_until_done(call)
    with pytest.raises(OSError, match="exit code -9; is there enough memory"):
        call.result()


def test_a_polite_request_to_end_is_for_the_rank_alone() -> None:
    def asked_to_end() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return "finished"

    assert ForkedCall(asked_to_end).result() == "finished"


def test_abandoned_it_ends() -> None:
    before = children()
    call: ForkedCall = ForkedCall(lambda: time.sleep(1000))
    assert not call.done()
    call.abandon()
    assert children() <= before


def test_the_copy_holds_no_socket() -> None:
    def sockets() -> list[str]:
        held = []
        for name in os.listdir("/proc/self/fd"):
            try:
                mode = os.stat(f"/proc/self/fd/{name}").st_mode
            except FileNotFoundError:
                continue
            if stat.S_ISSOCK(mode):
                held.append(name)
        return held

    with socket.create_server(("127.0.0.1", 0)):
        assert len(sockets()) > 0
        assert ForkedCall(sockets).result() == []


def test_the_copy_dies_with_a_killed_process() -> None:
    script = (
        "import os, signal, time\n"
        "from dash_dist.checkpoints.background import ForkedCall\n"
        "call = ForkedCall(lambda: time.sleep(1000))\n"
        "print(call._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL
    wait_for_end(int(process.stdout))


def test_an_index_that_cannot_be_made_is_an_error_of_every_rank() -> None:
    """Rank 0 makes it alone, while the others wait for its word; what goes wrong there need be no OSError."""

    def write_index(items: list[list[object]], results: list[list[object]]) -> None:
        raise KeyError("planner")

    plan = SimpleNamespace(items=[], write=lambda: SimpleNamespace(results=[], checksums={}), write_index=write_index)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dims = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
        save = MegatronSave(plan, dims, background=False)
        with pytest.raises(OSError, match="KeyError: 'planner'"):
            save.finish()
    finally:
        dist.destroy_process_group()

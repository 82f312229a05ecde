"""Processes that start in a second, since they are forked from a server that has imported the slow libraries."""

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch


@functools.cache
def fast_context() -> Any:
    """Select how processes start.

    A fork of a server that has imported the slow libraries starts in one second instead of ten. Those libraries
    initialise CUDA, which does not survive a fork: with CUDA, each process starts by itself.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["dash_dist.context_parallel", "dash_dist.megatron.engine", "dash_dist.training.run"]
    )
    return context


def start_servers() -> None:
    """Start the processes that serve all others of a session, which would else start with the first of them."""
    if fast_context().get_start_method() == "forkserver":
        forkserver.ensure_running()
    resource_tracker.ensure_running()


class PythonProcess:
    """`python ARGUMENTS` with one thread of computation, used as a `subprocess.Popen`.

    Args:
        arguments: -m MODULE or SCRIPT, and what follows.
        environment: all of it.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        receiver, sender = fast_context().Pipe(duplex=False)
        self._process = fast_context().Process(target=_run, args=(sender, list(arguments), environment))
        self._process.start()
        sender.close()
        # Standard output and standard error, in their order.
        self.stdout = os.fdopen(os.dup(receiver.fileno()), errors="replace")
        receiver.close()
        self._rest: list[str] = []
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, the negative number of the signal that ended the process, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end and return the output that was not read yet.

        Args:
            timeout: seconds; after them `subprocess.TimeoutExpired` is raised, and the process goes on.
        """
        if self._reader is None:
            self._reader = threading.Thread(target=lambda: self._rest.append(self.stdout.read()), daemon=True)
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired("python", timeout or 0)
        self._process.join()
        return "".join(self._rest), None


def _run(sender: Connection, arguments: list[str], environment: dict[str, str]) -> None:
    for descriptor in (1, 2):
        os.dup2(sender.fileno(), descriptor)
    sender.close()
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out

"""Descendants of this process, including orphans, and their termination.

Knows Linux processes; does not know Ray nor runs. Processes are ended by pid, never by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

import psutil

_PR_SET_CHILD_SUBREAPER = 36


class Family:
    """Context in which this process adopts every descendant whose parent dies, so that none escapes.

    On exit, descendants that are still alive are killed, and `strays` holds their descriptions.
    """

    def __init__(self) -> None:
        self.strays: list[str] = []
        self._before: set[int] = set()

    def __enter__(self) -> Self:
        _set_subreaper(True)
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.strays = [describe(process) for process in self.members()]
        end(self.members)
        # This process must reap orphans that have died since.
        for child in psutil.Process().children():
            if child.pid not in self._before:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)
        _set_subreaper(False)

    def members(self) -> list[psutil.Process]:
        """Return the living descendants that started within the context."""
        found = psutil.Process().children(recursive=True)
        return [process for process in found if process.pid not in self._before and alive(process)]


def end(members: Callable[[], Collection[psutil.Process]], *, seconds: float = 30.0) -> None:
    """Kill the processes that `members` returns until it returns none, since a dying process may start another.

    Raises TimeoutError if some are alive after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while left := members():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ended after SIGKILL: {[describe(process) for process in left]}")
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)


def tree(root: psutil.Process) -> list[psutil.Process]:
    """Return `root` and its living descendants; none if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [one for one in (root, *root.children(recursive=True)) if alive(one)]
    return []


def describe(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline()) or process.name()
        return f"{process.pid} ({process.status()}): {command[:160]}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone)"


def alive(process: psutil.Process) -> bool:
    """Return whether the process runs or is stopped; a zombie has ended."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _set_subreaper(on: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")

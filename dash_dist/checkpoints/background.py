"""Function that runs concurrently with training, in a forked copy of the rank with its memory at the fork.

Knows processes; does not know what the function does. The copy must not live on without its rank: it would hold the
rank's connections open, so that the rank's death goes unnoticed, and write where a restarted run writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import stat
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Generic, TypeVar, cast

from dash_dist.garbage import no_garbage_collection

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1

# CPython 3.11 forks with a lock that another thread may hold for a moment (of the list of thread states, which Ray's
# threads change without the interpreter's lock): such a copy never begins. It is ended, and another one forked.
_BEGIN_SECONDS = 20.0
_FORKS = 3
# A killed process that waits for a disk in the kernel goes when that answers.
_END_SECONDS = 30.0
# Loaded here: between fork and exec of a process with threads, nothing may be loaded any more.
_libc = ctypes.CDLL(None, use_errno=True)


class ForkedCall(Generic[T]):
    """`function()` in a forked process, which ends with its result, with this process, or with `abandon`.

    The function may use what it finds in memory, and open files; no CUDA, no connection of its parent's, no module that
    is not imported yet. Forking a process with threads is safe for such functions only. Where no copy begins, the
    function runs in this process, before `ForkedCall` returns.

    Args:
        function: what it returns is sent back by pickle; what it raises becomes an OSError.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._here: FinishedCall[T] | None = None
        for _ in range(_FORKS):
            self._fork(function)
            if self._has_begun():
                return
            self._end()
        self._here = FinishedCall(function)

    def _fork(self, function: Callable[[], T]) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(function, sender, os.getpid()), daemon=True)
        with no_garbage_collection():  # in the copy it would free CUDA memory, which belongs to the parent
            self._process.start()
        sender.close()

    def _has_begun(self) -> bool:
        if not self._receiver.poll(_BEGIN_SECONDS):
            return False
        with contextlib.suppress(EOFError):  # it was killed, which `result` will say
            self._receiver.recv()
        return True

    def _end(self) -> None:
        self._process.kill()
        self._process.join(_END_SECONDS)
        self._receiver.close()

    def done(self) -> bool:
        """Return whether the function has ended, well or not."""
        return self._here is not None or self._receiver.poll()

    def result(self) -> T:
        """Wait for the function, and return or raise what it did.

        Raises OSError if its process was killed.
        """
        if self._here is not None:
            return self._here.result()
        try:
            outcome = self._receiver.recv()
        except EOFError:
            self._process.join()
            raise OSError(
                f"the process that writes was ended with exit code {self._process.exitcode}; is there enough memory?"
            ) from None
        finally:
            self._receiver.close()
        self._process.join()
        return _unwrap(*outcome)

    def abandon(self) -> None:
        """End the process wherever it is."""
        if self._here is None:
            self._end()


class FinishedCall(Generic[T]):
    """As `ForkedCall`, but the function has run in this process when it is made."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._value, self._error = _outcome(function)

    def done(self) -> bool:
        """True."""
        return True

    def result(self) -> T:
        """Return or raise what the function did."""
        return _unwrap(self._value, self._error)

    def abandon(self) -> None:
        """There is nothing left to end."""


def _run(function: Callable[[], T], sender: Connection, parent: int) -> None:
    _die_with(parent)
    sender.send("begun")
    _let_go_of_sockets()
    # Whoever ends the rank politely lets it save first; what is under way is part of that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sender.send(_outcome(function))
    sender.close()


def _outcome(function: Callable[[], T]) -> tuple[T | None, OSError | None]:
    try:
        return function(), None
    except OSError as error:
        return None, error
    except Exception as error:  # whatever it is, `result` raises it; as an OSError it survives pickling
        return None, OSError(f"{type(error).__name__}: {error}")


def _unwrap(value: T | None, error: OSError | None) -> T:
    if error is not None:
        raise error
    return cast(T, value)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when the thread that forked it ends, however that happens."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def _let_go_of_sockets() -> None:
    """Give up this copy's hold on every socket of the rank, so that they close when the rank does.

    Even a killed process keeps them for as long as it waits for its disk. They are replaced, since the objects that
    belong to them would otherwise close whatever file has their number next.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is gone
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.dup2(nothing, descriptor, inheritable=False)

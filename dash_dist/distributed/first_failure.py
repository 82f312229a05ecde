"""The first failure among the ranks of a run, told to all of them at once.

Knows torch.distributed and its store; does not know what the ranks compute.

A rank that raises alone leaves the others in a collective. Over NCCL nothing wakes them before its timeout. So the rank
writes its reason to the group's store, and every other rank has a thread that reads it there: a rank that does not end
by itself is ended by that thread.
"""

import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dash_dist.errors import RankError, RunError

_POLL_SECONDS = 1.0
# For a rank that meets the failure itself, in a broken connection or an error that all ranks raise.
_PATIENCE_SECONDS = 15.0
# For the others to read the reason, which may be kept by the rank that failed.
_READING_SECONDS = 5.0

_runs = itertools.count()
"""Runs of this process, which its group has seen in the same number: they do not read each other's failures."""


_entered: "FirstFailure | None" = None


class FirstFailure:
    """Context of the ranks' common work, in an initialised process group; entered and left at every rank.

    An error that leaves it is printed at once and told to the other ranks, unless it is a RunError that every rank
    raises. NCCL's communicators are then aborted, since leaving them would wait for the others.

    Args:
        ending: called when this rank has failed and begins to leave the group.
        patience: seconds from another rank's failure to the end of this process, if it does not leave the context.
    """

    def __init__(self, *, ending: Callable[[], object], patience: float = _PATIENCE_SECONDS) -> None:
        self._ending = ending
        self._patience = patience
        self._rank = dist.get_rank()
        self._key = f"dash_dist/first_failure/{next(_runs)}"
        self._readers = f"{self._key}/readers"
        store: Any = distributed_c10d._get_default_store()
        # A connection of its own: another thread may wait in the group's.
        self._store = store.clone() if dist.get_world_size() > 1 else None
        self._reason: str | None = None  # another rank's
        self._told = False
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="first failure", daemon=True)

    def __enter__(self) -> Self:
        global _entered
        _entered = self
        if self._store is not None:
            self._thread.start()
        return self

    def tell(self, error: BaseException) -> None:
        """Print an error of this rank, and tell the other ranks if it is the first; once."""
        if self._told:
            return
        self._told = True
        reason = str(error) if isinstance(error, RankError) else f"rank {self._rank}: {type(error).__name__}: {error}"
        first = self._write(reason)
        if isinstance(error, RankError):
            _print(f"error: {error}")
        else:
            _print(f"rank {self._rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
        if first is not None:
            _print(f"rank {self._rank} failed after another one: {first}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _entered
        _entered = None
        self._left.set()
        if self._store is not None:
            self._thread.join()
        if error is None or (isinstance(error, RunError) and not isinstance(error, RankError)):
            self._wait_for_others()
            return
        if self._told and isinstance(error, RankError):  # says more than what was told
            _print(f"error: {error}")
        self.tell(error)
        if self._reason is None:
            self._wait_for_readers()
        self._ending()
        if "nccl" in str(dist.get_backend()):
            with suppress(RuntimeError):  # of a communicator that is broken already
                distributed_c10d._abort_process_group()

    def _write(self, reason: str) -> str | None:
        """Write the reason, if it is the first one; returns another rank's that came before."""
        if self._store is None or self._reason is not None:
            return self._reason
        try:
            found: str = self._store.compare_set(self._key, "", reason).decode()
            if found != reason:
                self._reason = found
                self._store.add(self._readers, 1)
        except (RuntimeError, OSError):  # the rank that keeps the store is gone, and so had failed before
            self._reason = "the rank that keeps the store has ended"
        return self._reason

    def _wait_for_readers(self) -> None:
        deadline = time.monotonic() + _READING_SECONDS
        with suppress(RuntimeError, OSError):
            while self._store is not None and time.monotonic() < deadline:
                if self._store.add(self._readers, 0) >= dist.get_world_size() - 1:
                    return
                time.sleep(_READING_SECONDS / 50)

    def _wait_for_others(self) -> None:
        """Let the ranks leave together, as far as that is soon: the store may go with this one."""
        left, deadline = f"{self._key}/left", time.monotonic() + self._patience
        with suppress(RuntimeError, OSError):
            if self._store is not None:
                self._store.add(left, 1)
            while self._store is not None and self._rank == 0 and time.monotonic() < deadline:
                if self._store.add(left, 0) >= dist.get_world_size():
                    return
                time.sleep(_READING_SECONDS / 50)

    def _watch(self) -> None:
        assert self._store is not None
        while not self._left.wait(_POLL_SECONDS):
            reason = self._read()
            if reason is None or self._told:
                continue
            self._reason = reason
            if not self._left.wait(self._patience):
                _print(f"error: rank {self._rank} is ended, because another one failed: {self._reason}")
                sys.stdout.flush()
                os._exit(1)  # the main thread waits in a collective, and would not see an exception
            return

    def _read(self) -> str | None:
        assert self._store is not None
        try:
            if not self._store.check([self._key]):
                return None
            found: str = self._store.get(self._key).decode()
            self._store.add(self._readers, 1)
            return found
        except (RuntimeError, OSError) as error:
            return f"the rank that keeps the store has ended ({error})"


def tell_failure(error: BaseException) -> None:
    """Tell the other ranks an error of this rank alone, before a collective in which they may not be."""
    if _entered is not None:
        _entered.tell(error)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

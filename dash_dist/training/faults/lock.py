"""One run at a time in a folder.

Knows one small file and the system's lock on it; does not know what a run does.

    <run directory>/run.lock        locked while a run is active; holds the host and pid of its rank 0
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from dash_dist.errors import RunError

# A rank 0 whose node was cut off may keep the lock until the file server declares it dead, after 90 s on Linux.
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.5
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunLock:
    """Context that holds the folder's lock; entered at rank 0 alone.

    The system releases the lock when the process ends in any way. Entering raises RunError if another process keeps
    it, and OSError if the folder cannot be written.

    Args:
        run_directory: an existing folder.
        note: receives a warning on a file system without locks, where the run continues without one.
        patience: seconds to wait for another run that is about to end.
    """

    def __init__(self, run_directory: Path, note: Callable[[str], None], *, patience: float = _PATIENCE_SECONDS):
        self._path = run_directory / "run.lock"
        self._note = note
        self._patience = patience
        self._file: IO[str] | None = None
        self._locked = False

    def __enter__(self) -> Self:
        file = self._path.open("a+", encoding="utf-8")
        try:
            self._lock(file)
            file.truncate(0)
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}, file)
            file.flush()
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        # Not by closing alone: a forked process that still writes a checkpoint holds the file open, too.
        with contextlib.suppress(OSError):  # the file server is away; the run is over all the same
            if self._locked:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def _lock(self, file: IO[str]) -> None:
        until = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise RunError(self._refusal(), retryable=True) from None
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._note(f"{self._path} cannot be locked ({error.strerror}): do not start this run twice")
                return
            else:
                self._locked = True
                return

    def _refusal(self) -> str:
        try:
            holder = json.loads(self._path.read_text(encoding="utf-8"))
            who = f"process {holder['pid']} on {holder['host']}, since {time.ctime(holder['since'])},"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        return (
            f"{who} is running in {self._path.parent}, and two runs would overwrite each other's checkpoints: wait "
            f"for it or end it, or give this run another run.name (if that process and its node are gone for good, "
            f"remove {self._path})"
        )

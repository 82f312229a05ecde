"""Kills a process that makes no progress, after writing the stacks of all its threads.

Knows time and stacks; does not know what a step is. Works in any thread, and also while a collective waits with the
interpreter lock held, where no Python code can run.

    <run directory>/hangs/attempt_0002/rank_00003.txt      empty, unless that rank hung
"""

import contextlib
import faulthandler
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

# Between the dump and the end of the process: the first rank to leave breaks the connections of the others, which
# would then fail before they dumped theirs.
_GRACE_SECONDS = 5.0

# For a rank that failed to leave its process group, which can wait for the others or for a broken device.
_LEAVING_SECONDS = 30.0

# Of a 512-rank run that hung, an event names a few files.
_FILES_NAMED = 4


class Watchdog:
    """Context in which every `beat` restarts a timer of `timeout` seconds that kills this process.

    SIGUSR1 writes the stacks at once: the supervisor sends it before it ends an attempt for another reason.

    Two timers expire: faulthandler's thread, which writes the stacks, and a few seconds later the process's interval
    timer, whose unhandled SIGALRM ends the process. Both work without the interpreter, and forked processes inherit
    neither.

    Args:
        timeout: seconds; None disables the watchdog.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._file: TextIO | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def start(self, folder: Path, rank: int) -> None:
        """Start the timer; stacks go to a file in `folder`, which is created. Raises OSError."""
        if self._timeout is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank_{rank:05d}.txt").open("w")
        faulthandler.register(signal.SIGUSR1, file=self._file)
        self._arm(self._file, self._timeout)

    def end_soon(self) -> None:
        """End this process in half a minute, if it has not left this context by then."""
        signal.setitimer(signal.ITIMER_REAL, _LEAVING_SECONDS)

    def beat(self) -> None:
        """Restart the timer after progress."""
        if self._file is None or self._timeout is None:
            return
        if time.monotonic() - self._last >= self._timeout:
            # It was slow, and ended within the grace: nothing hangs.
            self._file.seek(0)
            self._file.truncate()
        self._arm(self._file, self._timeout)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR1)
        self._file.close()
        path = Path(self._file.name)
        with contextlib.suppress(OSError):  # the folders go with the last file in them; another rank may be faster
            if path.stat().st_size == 0:
                path.unlink()
            path.parent.rmdir()
            path.parent.parent.rmdir()

    def _arm(self, file: TextIO, timeout: float) -> None:
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(timeout, file=file)
        signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE_SECONDS)


def hang_folder(run_directory: Path, attempt: int) -> Path:
    """Return the folder of the stacks of an attempt's ranks."""
    return run_directory / "hangs" / f"attempt_{attempt:04d}"


def describe_hang(folder: Path) -> str | None:
    """Describe the stacks that an attempt's ranks left in `folder`; None if no rank hung. Removes empty files."""
    with contextlib.suppress(OSError):
        dumps = []
        for path in sorted(folder.glob("rank_*.txt")):
            if path.stat().st_size:
                dumps.append(path)
            else:
                path.unlink()
        if dumps:
            named = ", ".join(path.name for path in dumps[:_FILES_NAMED])
            rest = f" and {len(dumps) - _FILES_NAMED} more" if len(dumps) > _FILES_NAMED else ""
            return f"no progress; {len(dumps)} of the ranks wrote their stacks and were ended: {folder}/ {named}{rest}"
        folder.rmdir()
    return None

"""Restarts of a run whose ranks torchrun or the DeepSpeed launcher starts.

    python -m dash_dist.cluster.local_supervisor LAUNCHER... -- CONFIG [KEY=VALUE]...

LAUNCHER... is a command that takes the arguments of `dash-dist train`; "{attempt}" in it becomes the number of the
attempt, from 0. Environment: RESTARTS (0), the failures in a row without a new checkpoint that are followed by
another attempt; RESTART_PAUSE (10), the seconds before it; NNODES and NODE_RANK, set on every one of several nodes.
LAUNCHER may describe the rank that failed first in the file DASH_DIST_FAILED_RANK; the event then names it.

Knows a launcher's exit status and the run's folder; does not know how a launcher starts ranks.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dash_dist.cluster.failures import FailureLog
from dash_dist.cluster.retries import Retries
from dash_dist.config.file import load_config
from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.1


class LocalSupervisor:
    """Attempts of one run on this node. SIGTERM and SIGINT let the launcher's ranks save, and end the restarts.

    Args:
        config: of the run.
        launcher: command without the run's arguments.
        arguments: of `dash-dist train`.
        restarts: see Retries.
        pause: seconds between attempts; ranks on other nodes fail later, and ports must be free again.
        alone: no other node restarts this run. Otherwise the node of rank 0 records its events.
    """

    def __init__(
        self,
        config: RunConfig,
        launcher: Sequence[str],
        arguments: Sequence[str],
        *,
        restarts: int,
        pause: float,
        alone: bool,
    ) -> None:
        self._launcher = launcher
        self._arguments = list(arguments)
        self._restarts = restarts
        self._pause = pause
        self._alone = alone
        self._log = FailureLog(config.run.path, _say)
        saved_step = self._log.saved_step()
        if config.run.resume == "never" and not saved_step:
            # Later checkpoints are this run's own: attempts after the first resume from them.
            self._arguments = [one for one in self._arguments if not one.startswith("run.resume=")]
            self._arguments.append("run.resume=auto")
        self._retries = Retries(restarts, saved_step=saved_step)
        self._child: subprocess.Popen[bytes] | None = None
        self._failed_rank = ""
        self._stopping = False

    def run(self) -> int:
        """Start attempts until one succeeds or none is to follow. Returns the last exit status of the launcher.

        Raises OSError if the launcher cannot be started.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        attempt = 0
        while True:
            self._log.begin()
            status = self._attempt(attempt)
            attempt += 1
            if status == 0 or self._stopping or not self._restart_follows(status):
                return status
            self._wait()
            # The record of a permanent error may reach this node late.
            if self._stopping or self._log.failed_for_good():
                return status

    def _attempt(self, number: int) -> int:
        command = [word.replace("{attempt}", str(number)) for word in self._launcher]
        with tempfile.TemporaryDirectory(prefix="dash-dist-", ignore_cleanup_errors=True) as folder:
            report = Path(folder) / "failed_rank"
            # In a process group of its own: Ctrl-C in a terminal reaches the ranks once, by way of `_stop`.
            self._child = subprocess.Popen(
                [*command, *self._arguments],
                env={**os.environ, "DASH_DIST_FAILED_RANK": str(report)},
                process_group=0,
                preexec_fn=_end_with_supervisor,
            )
            if self._stopping:  # the signal came while the launcher was being started
                self._child.terminate()
            status = self._child.wait()
            self._child = None
            self._failed_rank = report.read_text() if report.exists() else ""
        return status if status >= 0 else 128 - status

    def _restart_follows(self, status: int) -> bool:
        """Record the failure of an attempt. Returns False after a permanent one, and after too many in a row."""
        if self._log.failed_for_good():
            return False
        lost = self._log.attempt()
        pause = self._retries.pause_after_failure(self._log.saved_step(), trained=lost is not None)
        records = self._alone or (lost is not None and lost.host == socket.gethostname())
        cause = self._describe(status)
        if pause is None:
            if records:
                self._log.record("failed", f"{cause}; it is not started again (RESTARTS={self._restarts})")
            return False
        _say(
            f"the run failed with status {status}: starting it again "
            f"({self._retries.in_a_row} of {self._restarts} in a row without a new checkpoint)"
        )
        if records:
            self._log.restart(cause)
        return True

    def _describe(self, status: int) -> str:
        name = next(Path(word).stem for word in self._launcher if word != "python")
        rank = f" after {self._failed_rank}" if self._failed_rank else ""
        by_signal = f" ({signal.Signals(status - 128).name})" if status - 128 in set(signal.Signals) else ""
        return f"{name} on {socket.gethostname()} ended with status {status}{by_signal}{rank}"

    def _wait(self) -> None:
        until = time.monotonic() + self._pause
        while not self._stopping and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._child is not None:
            self._child.terminate()


def main() -> None:
    """Entry point. Exit status: the launcher's, 2 for a refused configuration, 127 for a launcher that is missing."""
    split = sys.argv.index("--")
    launcher, arguments = sys.argv[1:split], sys.argv[split + 1 :]
    try:
        config = load_config(Path(arguments[0]), arguments[1:])
    except ConfigError as error:
        _say(f"error: {error}")
        sys.exit(2)
    supervisor = LocalSupervisor(
        config,
        launcher,
        arguments,
        restarts=int(os.environ.get("RESTARTS") or 0),
        pause=float(os.environ.get("RESTART_PAUSE") or 10.0),
        alone=os.environ.get("NNODES", "1") == "1" and not os.environ.get("NODE_RANK"),
    )
    try:
        sys.exit(supervisor.run())
    except OSError as error:
        _say(f"error: {launcher[0]} cannot be started: {error}")
        sys.exit(127)


def _end_with_supervisor() -> None:
    """Have the system send SIGTERM to this process, the launcher, when its parent is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

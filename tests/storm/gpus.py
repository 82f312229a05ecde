"""GPU memory of this machine and the processes that hold it, as nvidia-smi tells.

Knows nvidia-smi; does not know runs. Without nvidia-smi, nothing holds GPU memory.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Collection

import psutil

from tests.storm.errors import StormError

# Differences that no process of a run makes: a process that has touched a GPU holds hundreds of MiB.
TOLERANCE_MIB = 64

_QUERY_SECONDS = 60


def parse_holders(text: str) -> dict[int, int]:
    """Return process id -> MiB from the output for `pid,used_memory`. Unknown amounts ("[N/A]") count as 0."""
    found: dict[int, int] = {}
    for line in filter(str.strip, text.splitlines()):
        pid, memory = (word.strip() for word in line.split(","))
        found[int(pid)] = found.get(int(pid), 0) + _mib(memory)
    return found


def parse_used(text: str) -> list[int]:
    """Return the MiB in use on each GPU from the output for `memory.used`."""
    return [_mib(line.strip()) for line in text.splitlines() if line.strip()]


class GpuMemory:
    """Check that GPU memory is held by the processes of a run only; memory held when this is made is ignored.

    A process of another container has no process here. Its memory shows in the total of its GPU alone.

    Args:
        gpus: GPUs that the run uses; with 0, others may use them all.
    """

    def __init__(self, gpus: int) -> None:
        self._is_checked = gpus > 0 and shutil.which("nvidia-smi") is not None
        self._before = frozenset(self._holders())
        self._used_before = self._used()

    def check_holders(self, allowed: Callable[[], Collection[int]], *, seconds: float) -> None:
        """Wait until no process but those `allowed` holds memory. Raises StormError after `seconds`."""
        deadline = time.monotonic() + seconds
        while left := self._strangers(allowed()):
            if time.monotonic() > deadline:
                raise StormError(f"processes hold GPU memory, and are not the run's: {left} (MiB by process id)")
            time.sleep(0.5)

    def check_free(self, *, seconds: float) -> None:
        """Wait until no GPU has more memory in use than at first. Raises StormError after `seconds`."""
        self.check_holders(list, seconds=seconds)
        deadline = time.monotonic() + seconds
        while self._grown(used := self._used()):
            if time.monotonic() > deadline:
                raise StormError(f"MiB in use on each GPU: {used}, and {self._used_before} before the storm")
            time.sleep(0.5)

    def _grown(self, used: list[int]) -> bool:
        return any(now > before + TOLERANCE_MIB for now, before in zip(used, self._used_before, strict=True))

    def _strangers(self, allowed: Collection[int]) -> dict[int, int]:
        return {
            pid: memory
            for pid, memory in self._holders().items()
            if pid not in self._before and pid not in allowed and psutil.pid_exists(pid)
        }

    def _holders(self) -> dict[int, int]:
        return parse_holders(self._query("--query-compute-apps=pid,used_memory"))

    def _used(self) -> list[int]:
        return parse_used(self._query("--query-gpu=memory.used"))

    def _query(self, what: str) -> str:
        if not self._is_checked:
            return ""
        command = ["nvidia-smi", what, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS)
        if done.returncode != 0:
            raise StormError(f"{' '.join(command)} failed with status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout


def _mib(text: str) -> int:
    """Return the number of "123 MiB"."""
    number = text.removesuffix("MiB").strip()
    return int(number) if number.isdecimal() else 0

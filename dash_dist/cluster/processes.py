"""Processes of the cluster's nodes: which one it is, a signal to it, and that it is gone.

Knows Linux's process table and how to look at that of another node through Ray; does not know what the processes do.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# Ray kills a process that does not leave after 5 s; what is there after this many is killed here.
_PATIENCE_SECONDS = 15.0

# A process in uninterruptible sleep, such as one that waits for a file server, is not waited for longer than this.
_LONGEST_WAIT_SECONDS = 60.0

# A node takes some seconds to start what sends the signals.
_SIGNAL_SECONDS = 15.0


@dataclass(frozen=True)
class ProcessId:
    """A process of a node, and no later one of the same number: `started` is in clock ticks since the node's boot."""

    pid: int
    started: int

    @classmethod
    def own(cls) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(pid, _started(pid) or 0)

    def exists(self) -> bool:
        """Return whether the process runs on this machine; a zombie does not."""
        return _started(self.pid) == self.started


def wait_until_gone(processes: Iterable[tuple[str, ProcessId]]) -> None:
    """Return when the `processes`, which were told to end, each given with the id of its Ray node, are gone.

    Nodes that are gone themselves are left out.
    """
    _on_their_nodes(see_them_gone, processes, seconds=_LONGEST_WAIT_SECONDS)


def signal_all(processes: Iterable[tuple[str, ProcessId]], number: signal.Signals) -> None:
    """Send a signal to `processes`, each given with the id of its Ray node; returns within seconds.

    From outside: a process that is stuck with the interpreter's lock answers no call.
    """

    def send(of_node: Sequence[ProcessId]) -> None:
        for process in of_node:
            with contextlib.suppress(ProcessLookupError):
                if process.exists():
                    os.kill(process.pid, number)

    _on_their_nodes(send, processes, seconds=_SIGNAL_SECONDS)


def _on_their_nodes(
    function: Callable[[Sequence[ProcessId]], None], processes: Iterable[tuple[str, ProcessId]], *, seconds: float
) -> None:
    """Call `function` on every node that lives with those of its processes; waits `seconds` at most."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    of_node: dict[str, list[ProcessId]] = {node["NodeID"]: [] for node in ray.nodes() if node["Alive"]}
    for node_id, process in processes:
        if node_id in of_node:
            of_node[node_id].append(process)
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(on_node)
        for node_id, on_node in of_node.items()
        if on_node
    ]
    if calls:
        # A call that fails does so because its node goes; then so do the processes.
        ray.wait(calls, num_returns=len(calls), timeout=seconds)


def see_them_gone(processes: Sequence[ProcessId]) -> None:
    """Wait until `processes` of this machine are gone, and kill those that take too long."""
    begun = time.monotonic()
    while any(process.exists() for process in processes) and time.monotonic() - begun < _LONGEST_WAIT_SECONDS:
        if time.monotonic() - begun > _PATIENCE_SECONDS:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    if process.exists():
                        os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.1)


def _started(pid: int) -> int | None:
    """Start time of process `pid`, None if there is none or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name in parentheses, which may hold anything: the state is field 3, the start time field 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])

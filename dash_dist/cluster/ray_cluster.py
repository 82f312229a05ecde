"""The cluster that this process is connected to through Ray, as the supervisor sees it.

Knows which resources a worker takes; does not know when workers are started.
"""

from collections.abc import Callable, Mapping, Sequence

from dash_dist.cluster.group import NodeLost, WorkerGroup
from dash_dist.cluster.nodes import (
    CPU_WORKER,
    GPU_WORKER,
    alive_nodes,
    ask_for_nodes,
    preemption_notice,
    room_for_workers,
)
from dash_dist.cluster.supervisor import View


class RayCluster:
    """Workers on the connected Ray cluster.

    A worker takes a CPU, and a GPU too from the moment on that the cluster was seen to have any: nodes with GPUs may
    still be on their way when the run starts.

    Args:
        start_seconds, answer_seconds: of each WorkerGroup.
    """

    def __init__(self, *, start_seconds: float, answer_seconds: float) -> None:
        self._worker: Mapping[str, float] = CPU_WORKER
        self._asked_for = 0
        self._start_seconds = start_seconds
        self._answer_seconds = answer_seconds

    def look(self, held: Sequence[str] = ()) -> View:
        """Return the current view; `held` are the node ids of the current workers, one for each."""
        if self._worker is CPU_WORKER and any(node.room for node in alive_nodes(GPU_WORKER)):
            self._worker = GPU_WORKER
            if self._asked_for:
                ask_for_nodes(self._worker, self._asked_for)
        nodes = alive_nodes(self._worker)
        return View(room=room_for_workers(nodes, held), notice=preemption_notice(nodes, held))

    def place(self, num_workers: int, keep_waiting: Callable[[], None]) -> WorkerGroup:
        """Workers that wait for their job. Raises AttemptFailed, and what `keep_waiting` raises."""

        def still_possible() -> None:
            keep_waiting()
            # A node's death is noticed seconds after it: what had room then may have none now.
            room = sum(node.room for node in alive_nodes(self._worker) if node.leaves_at is None)
            if room < num_workers:
                raise NodeLost(
                    f"a node was lost while {num_workers} workers were being placed: room for {room} is left"
                )

        return WorkerGroup(
            num_workers,
            self._worker,
            start_seconds=self._start_seconds,
            answer_seconds=self._answer_seconds,
            keep_waiting=still_possible,
        )

    def ask_for(self, workers: int) -> None:
        """Say how many workers there is work for, where someone may add nodes."""
        self._asked_for = workers
        ask_for_nodes(self._worker, workers)

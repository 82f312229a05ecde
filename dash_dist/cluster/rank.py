"""One rank as a process of the cluster: the actor that joins the ranks' group, trains, and answers the driver.

Knows how ranks meet (torch's store) and that `train` exists; does not know who starts the ranks nor why they end.
"""

import ctypes
import os
import queue
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dash_dist.cluster.processes import ProcessId
from dash_dist.config.run import RunConfig
from dash_dist.distributed.loopback import is_loopback, keep_to_loopback, listen, meet
from dash_dist.errors import RunError
from dash_dist.run.messages import RunStart, RunSummary, StepReport
from dash_dist.run.requests import Asked

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

News = tuple[str, Any]
"""What rank 0 has to tell: the ProgressReporter method that was called, and its argument."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs: Ray's node id, the node's address, the process, and the GPU it was given, None on CPUs."""

    node_id: str
    address: str
    process: ProcessId
    gpu: str | None


@dataclass(frozen=True)
class Seat:
    """One rank among all, as torchrun would put it into the environment; `gpus` are its node's, by local rank."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Task of every rank.

    Attributes:
        config: of the run.
        directory: the driver's working directory, which the relative paths in `config` start from.
        join_seconds: a rank that waits this long for the others to arrive gives up.
    """

    config: RunConfig
    directory: str
    join_seconds: float


@dataclass(frozen=True)
class Ended:
    """End of a rank that ended by itself: the summary of its run, or a permanent error."""

    summary: RunSummary | None = None
    refusal: RunError | None = None


def end_of(run: Callable[[], RunSummary]) -> Ended:
    """Return the end of `run`. Re-raises errors that may pass on another attempt."""
    try:
        return Ended(summary=run())
    except RunError as error:  # raised at every rank
        if error.may_pass:
            raise
        return Ended(refusal=error)


class RankProcess:
    """The actor of one rank. `train` runs in one thread, `poll` answers in another.

    The process ends with its raylet, the Ray daemon of its node that started it, even when it is stopped (SIGSTOP)
    and could not notice: no rank is left over from a lost node.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._asked = Asked()
        self._listener: socket.socket | None = None

    def place(self) -> Place:
        """Where this process is."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        address = ray.util.get_node_ip_address()
        return Place(ray.get_runtime_context().get_node_id(), address, ProcessId.own(), gpus[0] if gpus else None)

    def listen(self) -> int:
        """Open the port at which the ranks will meet, at the node's address only; called at the first rank.

        Returns the port. It stays open until the ranks have met there, so that nobody else can take it in between.
        """
        import ray

        self._listener = listen(ray.util.get_node_ip_address())
        return self._listener.getsockname()[1]

    def train(self, job: Job, seat: Seat) -> Ended:
        """Join the others and run the job to its end. Raises what a run raises that may succeed when tried again."""
        import ray
        import torch
        import torch.distributed as dist

        # In a submitted job the working directory is a copy of the tree that was packed, and Ray has set it already.
        if not ray.get_runtime_context().runtime_env.get("working_dir"):
            os.chdir(job.directory)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // seat.local_world_size))
        self._join(job, seat)
        # Imported with the environment of the seat in place.
        from dash_dist.training.run import train

        ended = end_of(lambda: train(job.config, reporter=_NewsReporter(self._news), requests=lambda: self._asked))
        # Not after any other error: the others may be gone, and leaving together would wait for them.
        dist.destroy_process_group()
        return ended

    def poll(self, asked: Asked) -> list[News]:
        """Say what the run is asked for from now on; returns the news since the last call."""
        self._asked = asked
        news = []
        while not self._news.empty():
            news.append(self._news.get())
        return news

    def _join(self, job: Job, seat: Seat) -> None:
        import torch
        import torch.distributed as dist

        os.environ |= {
            "RANK": str(seat.rank),
            "WORLD_SIZE": str(seat.world_size),
            "LOCAL_RANK": str(seat.local_rank),
            "LOCAL_WORLD_SIZE": str(seat.local_world_size),
            "MASTER_ADDR": seat.master_address,
            "MASTER_PORT": str(seat.master_port),
        }
        if is_loopback(seat.master_address):
            keep_to_loopback()
        group: dict[str, Any] = {"backend": "gloo"}
        if seat.gpus:
            # As torchrun does: every rank sees the GPUs of its node's ranks, which NCCL needs for direct copies
            # between them.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seat.gpus)
            device = torch.device("cuda", seat.local_rank)
            torch.cuda.set_device(device)
            group = {"backend": "nccl", "device_id": device}
        store = meet(
            seat.master_address,
            seat.master_port,
            seat.world_size,
            listener=self._listener,
            timeout=timedelta(seconds=job.join_seconds),
        )
        # Store operations of the group wait as long as the group; that all have arrived is awaited for less.
        store.set(f"arrived/{seat.rank}", "")
        store.wait([f"arrived/{rank}" for rank in range(seat.world_size)])
        timeout = job.config.training.distributed_timeout
        dist.init_process_group(**group, store=store, rank=seat.rank, world_size=seat.world_size, timeout=timeout)


class _NewsReporter:
    """The ProgressReporter of rank 0: what it is told waits for the driver to fetch it."""

    def __init__(self, news: "queue.SimpleQueue[News]") -> None:
        self._news = news

    def start(self, run: RunStart) -> None:
        self._news.put(("start", run))

    def update(self, report: StepReport) -> None:
        self._news.put(("update", report))

    def note(self, text: str) -> None:
        self._news.put(("note", text))

    def finish(self, summary: RunSummary) -> None:
        self._news.put(("finish", summary))

    def close(self) -> None:
        """Nothing is open here: the driver closes its console."""

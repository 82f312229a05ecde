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
from dash_dist.run.requests import Command

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

ProgressMessage = tuple[str, Any]
"""A call at rank 0 for the driver's console: the name of a ProgressReporter method, and its argument."""


@dataclass(frozen=True)
class Place:
    """Location of a worker: Ray's node id, the node's address, the process, and its GPU, None on CPUs."""

    node_id: str
    address: str
    process: ProcessId
    gpu: str | None


@dataclass(frozen=True)
class RankEnv:
    """Environment of one rank, with torchrun's meanings. `gpus` are those of its node, by local rank."""

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
class RankResult:
    """Result of a rank that ended by itself: the summary of its run, or a permanent error."""

    summary: RunSummary | None = None
    refusal: RunError | None = None


def result_of(run: Callable[[], RunSummary]) -> RankResult:
    """Return the result of `run`. Re-raises errors that another attempt may avoid."""
    try:
        return RankResult(summary=run())
    except RunError as error:  # raised at every rank
        if error.retryable:
            raise
        return RankResult(refusal=error)


class RankProcess:
    """The actor of one rank. `train` runs in one thread, `poll` answers in another.

    The system kills the process together with its raylet, the Ray daemon of its node, even while it is stopped by
    SIGSTOP. No rank outlives its node.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self._messages: queue.SimpleQueue[ProgressMessage] = queue.SimpleQueue()
        self._command = Command()
        self._listener: socket.socket | None = None

    def place(self) -> Place:
        """Return the location of this process."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        address = ray.util.get_node_ip_address()
        return Place(ray.get_runtime_context().get_node_id(), address, ProcessId.own(), gpus[0] if gpus else None)

    def listen(self) -> int:
        """Open the port at which the ranks will meet, at the node's address only; called at the first rank.

        Returns the port, which stays open until the ranks have met: no other process can take it in between.
        """
        import ray

        self._listener = listen(ray.util.get_node_ip_address())
        return self._listener.getsockname()[1]

    def train(self, job: Job, env: RankEnv) -> RankResult:
        """Join the other ranks and run the job to its end. Raises errors that another attempt may avoid."""
        import ray
        import torch
        import torch.distributed as dist

        # In a submitted job the working directory is a copy of the tree that was packed, and Ray has set it already.
        if not ray.get_runtime_context().runtime_env.get("working_dir"):
            os.chdir(job.directory)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // env.local_world_size))
        self._join(job, env)
        # Imported with the rank's environment in place.
        from dash_dist.training.run import train

        ended = result_of(
            lambda: train(job.config, reporter=_MessageReporter(self._messages), requests=lambda: self._command)
        )
        # Not after any other error: the others may be gone, and leaving together would wait for them. A rank that
        # failed alone has aborted the group.
        if dist.is_initialized():
            dist.destroy_process_group()
        return ended

    def poll(self, command: Command) -> list[ProgressMessage]:
        """Replace the command to the run; returns the messages since the last call."""
        self._command = command
        messages = []
        while not self._messages.empty():
            messages.append(self._messages.get())
        return messages

    def _join(self, job: Job, env: RankEnv) -> None:
        import torch

        # Imports torch, which the driver does without.
        from dash_dist.distributed.process_group import join_process_group

        os.environ |= {
            "RANK": str(env.rank),
            "WORLD_SIZE": str(env.world_size),
            "LOCAL_RANK": str(env.local_rank),
            "LOCAL_WORLD_SIZE": str(env.local_world_size),
            "MASTER_ADDR": env.master_address,
            "MASTER_PORT": str(env.master_port),
        }
        if is_loopback(env.master_address):
            keep_to_loopback()
        device = torch.device("cpu")
        if env.gpus:
            # As torchrun does: every rank sees the GPUs of its node's ranks, which NCCL needs for direct copies
            # between them.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(env.gpus)
            device = torch.device("cuda", env.local_rank)
            torch.cuda.set_device(device)
        store = meet(
            env.master_address,
            env.master_port,
            env.world_size,
            listener=self._listener,
            timeout=timedelta(seconds=job.join_seconds),
        )
        # Store operations of the group wait as long as the group; that all have arrived is awaited for less.
        store.set(f"arrived/{env.rank}", "")
        store.wait([f"arrived/{rank}" for rank in range(env.world_size)])
        timeout = job.config.training.distributed_timeout
        join_process_group(device, store, env.rank, env.world_size, timeout=timeout)


class _MessageReporter:
    """ProgressReporter of rank 0 that queues its calls until the driver fetches them."""

    def __init__(self, messages: "queue.SimpleQueue[ProgressMessage]") -> None:
        self._messages = messages

    def start(self, run: RunStart) -> None:
        self._messages.put(("start", run))

    def update(self, report: StepReport) -> None:
        self._messages.put(("update", report))

    def note(self, text: str) -> None:
        self._messages.put(("note", text))

    def finish(self, summary: RunSummary) -> None:
        self._messages.put(("finish", summary))

    def close(self) -> None:
        """Do nothing: the driver closes its console."""

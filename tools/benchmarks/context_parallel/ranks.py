"""The ranks of a benchmark: one process per GPU, started and ended together. Knows nothing of what they measure."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRACE = 3.0  # seconds between asking a process to end and ending it


class RanksFailedError(RuntimeError):
    """A rank failed or died, or all of them together took too long; every rank has been ended."""


@dataclass(frozen=True)
class Ranks:
    """A rank's view of itself and the others.

    group: the context-parallel group, NCCL on GPUs. control: gloo, for times and errors, so that a question of the
    hosts is never queued behind work on the GPUs.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    control: dist.ProcessGroup

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, at every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def align(self) -> None:
        """Lets no rank's device, nor its host, go on before all have come here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.control)
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)  # the hosts are less in step than this


def run_ranks(function: Callable[..., None], size: int, device: str, time_limit: float, *arguments: Any) -> None:
    """Calls function(ranks, *arguments) in `size` processes, one per device; returns when all have returned.

    Raises RanksFailedError with the first failure of any, or after time_limit seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deadline = time.monotonic() + time_limit
    context = mp.spawn(_rank, (size, device, port, time_limit, function, arguments), nprocs=size, join=False)
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0), grace_period=GRACE):
            if time.monotonic() >= deadline:
                raise RanksFailedError(f"the ranks took more than {time_limit:g} s: raise --time-limit or ask for less")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        raise RanksFailedError(str(error)) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank(
    rank: int,
    size: int,
    device: str,
    port: int,
    time_limit: float,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo looks the host's name up, which not every machine knows
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=time_limit),
        device_id=own if device == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=time_limit))
    assert dist.group.WORLD is not None  # initialised above
    function(Ranks(rank, size, own, dist.group.WORLD, control), *arguments)
    dist.destroy_process_group()

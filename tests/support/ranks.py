"""Processes for tests of several ranks, started and ended together, with results by rank.

Knows processes and process groups; does not know their jobs.
"""

import contextlib
import functools
import importlib
import itertools
import multiprocessing.connection
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Collection, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.support.processes import fast_context


def backend_for(world_size: int) -> str:
    """Return nccl if every rank can have its own GPU, and gloo otherwise."""
    return "nccl" if torch.cuda.device_count() >= world_size else "gloo"


@functools.cache
def _ports() -> Iterator[int]:
    """Give this worker of pytest-xdist ports that no other worker gives, outside the range of the system's own."""
    workers, all_ports = 16, range(21000, 32000)
    own = list(all_ports[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers :: workers])
    start = random.randrange(len(own))  # another run of the tests begins elsewhere
    return itertools.cycle(own[start:] + own[:start])


def free_port() -> int:
    """Return a loopback port that is free now, for a process that must be told one before it listens.

    Another process can take it first: give a listening socket instead where that is possible.
    """
    for port in _ports():
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("the ports have no end")


def run_ranks(
    job: str,
    world_size: int,
    *arguments: Any,
    time_limit: float = 420.0,
    cpu_only: bool = False,
    dying: Collection[int] = (),
) -> list[Any]:
    """Call "module:function"(*arguments) in `world_size` processes of one group; a single process has no group.

    Args:
        time_limit: seconds until all ranks are ended; the first failure ends them as well.
        cpu_only: hide GPUs from the ranks.
        dying: ranks that may die. Their result is None.

    Returns:
        The result of each rank.
    """
    # The store lives here: a port that is free before rank 0 listens may be taken when it does.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world_size > 1 else None
    port = 0 if store is None else store.port
    context = fast_context()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(pipes[rank][1], job, rank, world_size, port, cpu_only, arguments))
        for rank in range(world_size)
    ]
    results: dict[int, Any] = {}
    deadline = time.monotonic() + time_limit
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        while len(results) < world_size:
            waiting: dict[Any, int] = {pipes[rank][0]: rank for rank in range(world_size) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), timeout=deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} took more than {time_limit:.0f} s")
            for receiver in ready:
                rank = waiting[receiver]
                try:
                    error, results[rank] = pickle.loads(pipes[rank][0].recv_bytes())
                except EOFError:
                    if rank in dying:
                        results[rank] = None
                        continue
                    raise RuntimeError(f"rank {rank} died") from None
                if error is not None:
                    raise RuntimeError(f"rank {rank} failed:\n{error}")
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill() if len(results) < world_size else process.join(20)
                process.join(20)
    return [results[rank] for rank in range(world_size)]


def _rank(
    sender: Connection,
    job: str,
    rank: int,
    world_size: int,
    port: int,
    cpu_only: bool,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if cpu_only:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read at the first call of CUDA, which no rank has made yet
    module, function = job.split(":")
    try:
        if world_size > 1:
            backend = backend_for(world_size)
            if backend == "nccl":
                torch.cuda.set_device(rank)
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=120))
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
            )
        message: tuple[str | None, Any] = None, getattr(importlib.import_module(module), function)(*arguments)
        if world_size > 1:
            dist.destroy_process_group()
    except BaseException:
        message = traceback.format_exc(), None
    sender.send_bytes(pickle.dumps(message))
    sender.close()

"""The process group of a run: one device, backend and store per rank.

Knows torch.distributed, and the environment variables that torchrun and DeepSpeed's launcher set. Does not know what
the ranks compute.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dash_dist.distributed.loopback import MEETING_FOLDER, is_loopback, keep_to_loopback, listen, meet, meet_in

if TYPE_CHECKING:
    from torch.distributed import Store


def choose_device() -> torch.device:
    """Choose and return this rank's device: the only visible GPU, LOCAL_RANK's or the current one, or the CPU.

    Beside a GPU, operators on the CPU use one thread, whatever OMP_NUM_THREADS says.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # They are few and small. Between two of them, the threads of a pool wait by keeping every core busy.
    torch.set_num_threads(1)
    index = 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def join_process_group(
    device: torch.device, store: "Store | None", rank: int, world_size: int, *, timeout: timedelta
) -> None:
    """Join the default process group: over NCCL on a GPU, which must be the current device, and over Gloo on a CPU.

    Args:
        store: where the ranks meet; None is the one that the launcher's environment describes.
        timeout: after which a collective that some rank never joins fails.
    """
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        device_id=device if on_gpu else None,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


@contextlib.contextmanager
def joined_process_group(*, timeout: timedelta) -> Iterator[None]:
    """Join the group that the environment describes, and leave it at the end; an initialised group is used as it is.

    Chooses this rank's device.
    """
    device = choose_device()
    if dist.is_initialized():
        yield
        return
    join_from_environment(device, timeout=timeout)
    try:
        yield
    finally:
        if dist.is_initialized():  # a failure may have aborted it
            dist.destroy_process_group()


def join_from_environment(device: torch.device, *, timeout: timedelta) -> None:
    """Join the group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without RANK, a group of this process alone.

    With a MASTER_ADDR of this machine only, nothing listens beyond it unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME
    say so.
    """
    if "RANK" not in os.environ:
        join_process_group(device, dist.HashStore(), 0, 1, timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = None
    if is_loopback(address := os.environ.get("MASTER_ADDR", "")):
        keep_to_loopback()
        if folder := os.environ.get(MEETING_FOLDER):  # launch/local_torchrun.py
            store = meet_in(Path(folder), rank, world_size, timeout=timeout)
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun may have one already
            port = int(os.environ["MASTER_PORT"])
            listener = listen(address, port) if rank == 0 else None
            store = meet(address, port, world_size, listener=listener, timeout=timeout)
    join_process_group(device, store, rank, world_size, timeout=timeout)

"""The loopback interface, which no other machine can reach, and the store through which ranks meet.

Knows addresses, interfaces and ports; does not know what started the ranks.
"""

import ipaddress
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from dash_dist.run.files import replace_text

if TYPE_CHECKING:
    from torch.distributed import Store


MEETING_FOLDER = "DASH_DIST_MEETING"
"""Environment variable with the folder for `meet_in`, set by launchers on one machine."""


def is_loopback(address: str) -> bool:
    """Return whether `address`, an IP address or a name, is a loopback one. Host names are not looked up."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def loopback_interface() -> str:
    """Return the interface with the address 127.0.0.1. Raises OSError without one."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == "127.0.0.1" for one in addresses):
            return name
    raise OSError("no network interface has the address 127.0.0.1")


def keep_to_loopback() -> None:
    """Let Gloo and NCCL connect the ranks over loopback, unless the environment says otherwise."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name not in os.environ:
            os.environ[name] = loopback_interface()


def listen(address: str, port: int = 0) -> socket.socket:
    """Open a listening socket for `meet`; port 0 takes a free one. Raises OSError if the port is taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # Every rank connects at about the same time.
    return socket.create_server((address, port), family=family, backlog=4096)


def meet_in(folder: Path, rank: int, world_size: int, *, timeout: timedelta) -> "Store":
    """Call `meet` at a port that rank 0 chooses and writes into `folder`, which belongs to this start alone."""
    told = folder / "port"
    if rank == 0:
        listener = listen("127.0.0.1")
        port = listener.getsockname()[1]
        replace_text(told, str(port))
        return meet("127.0.0.1", port, world_size, listener=listener, timeout=timeout)
    deadline = time.monotonic() + timeout.total_seconds()
    while not told.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not arrive within {timeout.total_seconds():.0f} s")
        time.sleep(0.05)
    return meet("127.0.0.1", int(told.read_text()), world_size, listener=None, timeout=timeout)


def meet(address: str, port: int, world_size: int, *, listener: socket.socket | None, timeout: timedelta) -> "Store":
    """Return the store through which the ranks find each other, at rank 0's address. Rank 0 passes its `listener`.

    PyTorch's own store at MASTER_ADDR and MASTER_PORT would listen on every address of the machine.
    """
    from torch.distributed import TCPStore

    return TCPStore(
        address,
        port,
        world_size,
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,  # the process group waits, and says who is missing
        master_listen_fd=None if listener is None else listener.detach(),
    )

"""The part of the network that no other machine can reach.

Knows addresses and interfaces, and how the ranks of one machine meet there; does not know what started them.
"""

import ipaddress
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from torch.distributed import Store


def is_loopback(address: str) -> bool:
    """Whether `address`, an IP address or a name, is of this machine only. Names of hosts are not looked up."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def loopback_interface() -> str:
    """Raises OSError if there is none."""
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
    """A socket for `meet`; port 0 takes a free one. Raises OSError if the port is taken."""
    return socket.create_server((address, port), backlog=4096)  # every rank connects at about the same time


def meet(address: str, port: int, world_size: int, *, listener: socket.socket | None, timeout: timedelta) -> "Store":
    """The store by which ranks find each other, at an address of rank 0, which gives its `listener`.

    As PyTorch makes it from MASTER_ADDR and MASTER_PORT, but for the addresses it listens on, which would be all.
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

"""A check in every rank of a process group on this machine.

Knows process groups; does not know what the ranks check. Nothing here listens outside the loopback interface: the ranks
meet through a file, and their connections are on loopback.
"""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from dash_dist.distributed.loopback import loopback_interface
from dash_dist.doctor.findings import Finding
from dash_dist.doctor.processes import call_in_processes
from dash_dist.doctor.site import Site


def check_in_ranks(
    function: Callable[[Site], list[Finding]], site: Site, *, backend: str, ranks: int, time_limit: float
) -> list[Finding]:
    """`function(site)` in `ranks` processes of one group over `backend` ("gloo" or "nccl"); the findings of rank 0.

    Raises ProcessFailure if any rank raises or dies, or if they take longer than `time_limit` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="dash-dist-doctor-") as folder:
        store = Path(folder) / "store"
        calls = [(function, site, backend, store, rank, ranks, time_limit) for rank in range(ranks)]
        return call_in_processes(_rank, calls, time_limit=time_limit)[0]


def _rank(
    function: Callable[[Site], list[Finding]],
    site: Site,
    backend: str,
    store: Path,
    rank: int,
    ranks: int,
    time_limit: float,
) -> list[Finding]:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback_interface()
    import torch
    import torch.distributed as dist

    from dash_dist.distributed.process_group import join_process_group

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    meeting = dist.FileStore(str(store), ranks)
    join_process_group(device, meeting, rank, ranks, timeout=timedelta(seconds=time_limit))
    try:
        return function(site)
    finally:
        dist.destroy_process_group()

"""Checks that the tests give to the doctor's own processes: healthy ones of the doctor in a situation that is not."""

import itertools
import os
import resource
import time
from unittest import mock

import torch
import torch.distributed as dist

from dash_dist.context_parallel import allgather, ring, selective
from dash_dist.doctor import Finding, Site
from dash_dist.doctor.checks import links, parity, storage


def hangs(site: Site) -> list[Finding]:
    """Rank 1 writes its process id and never answers; the others wait for it."""
    if dist.get_rank() == 1:
        (site.directory / "pid").write_text(str(os.getpid()))
        time.sleep(3600)
    dist.barrier()
    return []


def dies(site: Site) -> list[Finding]:
    if dist.get_rank() == 1:
        os.write(2, b"the last words of rank 1\n")
        os._exit(7)
    dist.barrier()
    return []


def raises(site: Site) -> list[Finding]:
    raise RuntimeError("a library that is broken")


def leaves_a_process(site: Site) -> list[Finding]:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "3600"], {})
    (site.directory / "pid").write_text(str(pid))
    time.sleep(3600)
    return []


def no_room(site: Site) -> list[Finding]:
    """A file may grow to 1 MiB: writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    return storage.speed(site)


def clock_behind(site: Site) -> list[Finding]:
    real = time.time

    def behind() -> float:
        return real() - 5.0 * (dist.get_rank() == 1)

    with mock.patch.object(time, "time", behind):
        return links.clocks(site)


def blind_rank(site: Site) -> list[Finding]:
    """Rank 1 has another file system where the run's directory should be."""
    with mock.patch.object(storage, "_holds", (lambda path: False) if dist.get_rank() == 1 else storage._holds):
        return storage.shared(site)


def wrong_sum(site: Site) -> list[Finding]:
    real = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments, **options):
        real(tensor, *arguments, **options)
        if dist.get_rank() == 1:
            tensor[-1] += 1

    with mock.patch.object(dist, "all_reduce", all_reduce):
        return links.collectives(site)


_EXCHANGES = {"ring": ring.Ring, "allgather": allgather.AllGather, "selective": selective.Selective}


def canary_with_a_wrong_value(site: Site) -> list[Finding]:
    """Rank 1 sends values that are off in the seventh digit, by the exchange that the directory's name says."""
    kind = _EXCHANGES[site.directory.name]
    real = kind.deliver

    def deliver(self, k, v, traffic):
        return real(self, k, v * (1 + 1e-7) if dist.get_rank() == 1 else v, traffic)

    with mock.patch.object(kind, "deliver", deliver):
        return parity.canary(site)


def canary_with_a_lost_gradient(site: Site) -> list[Finding]:
    """Of every contribution to the gradients of K and V but the first, half is lost."""
    kind = _EXCHANGES[site.directory.name]
    real = kind.deliver

    class Lossy:
        def __init__(self, delivery):
            self._delivery = delivery

        def parts(self):
            return self._delivery.parts()

        def gradients(self, contribution_to):
            shares = itertools.chain([1.0], itertools.repeat(0.5))
            return self._delivery.gradients(lambda part: contribution_to(part) * next(shares))

    with mock.patch.object(kind, "deliver", lambda self, k, v, traffic: Lossy(real(self, k, v, traffic))):
        return parity.canary(site)

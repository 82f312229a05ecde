"""Checks of the operating system: shared memory, open files, a synchronised clock.

Knows this machine's limits; does not know what uses them.
"""

import ctypes
import os
import resource
import time

from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, skipped, warning
from dash_dist.doctor.site import Site

_SHARED_MEMORY = "/dev/shm"
_ENOUGH_SHARED_MEMORY = 2**30
"""Bytes that NCCL's buffers between the GPUs of a node and Ray's object store fit into; a container's default of 64 MiB
is too little for either."""
_LEAST_SHARED_MEMORY = 2**26
_LEAST_OPEN_FILES = 1024
_ENOUGH_OPEN_FILES = 4096
_WATCHED_SECONDS = 0.2
_JUMP_SECONDS = 0.02
_CLOCK_NOT_SYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


def shared_memory(site: Site) -> list[Finding]:
    name = "shared memory"
    advice = "Give the container more with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm)."
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        return [failure(name, f"{_SHARED_MEMORY}: {error.strerror}", advice)]
    free = status.f_bavail * status.f_frsize
    text = f"{free / 2**30:.2f} GiB free in {_SHARED_MEMORY}"
    if free < _LEAST_SHARED_MEMORY:
        return [failure(name, text, advice, free / 2**30, "GiB")]
    if free < _ENOUGH_SHARED_MEMORY:
        return [warning(name, text, advice, free / 2**30, "GiB")]
    return [ok(name, text, free / 2**30, "GiB")]


def open_files(site: Site) -> list[Finding]:
    name = "open files"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return [ok(name, "no limit")]
    text = f"a process may open {soft}"
    advice = (
        "Raise it with `ulimit -n 65536` before the start (hard limit: /etc/security/limits.conf, or LimitNOFILE=)."
    )
    if soft < _LEAST_OPEN_FILES:
        return [failure(name, text, advice, soft, "files")]
    if soft < _ENOUGH_OPEN_FILES:
        return [warning(name, f"{text}; Ray and data loaders open thousands", advice, soft, "files")]
    return [ok(name, text, soft, "files")]


def clock(site: Site) -> list[Finding]:
    name = "clock"
    before = _wall_ahead_of_monotonic()
    time.sleep(_WATCHED_SECONDS)
    jump = abs(_wall_ahead_of_monotonic() - before)
    if jump > _JUMP_SECONDS:
        return [
            failure(
                name,
                f"the wall clock jumped by {jump:.3f} s while it was watched",
                "Let one service keep the time (chrony or systemd-timesyncd), and stop any other.",
                jump,
                "s",
            )
        ]
    synchronised = _synchronised()
    if synchronised is None:
        return [skipped(f"{name} synchronised", "the kernel does not tell")]
    if not synchronised:
        return [
            warning(
                name,
                "steady, but not synchronised with a time server",
                "With several nodes, run chrony or systemd-timesyncd on each: curves and logs are ordered by time.",
            )
        ]
    return [ok(name, "steady, and synchronised with a time server")]


def _wall_ahead_of_monotonic() -> float:
    """In seconds, from the reading that was interrupted least."""
    readings = []
    for _ in range(5):
        started, now, ended = time.monotonic(), time.time(), time.monotonic()
        readings.append((ended - started, now - (started + ended) / 2))
    return min(readings)[1]


def _synchronised() -> bool | None:
    """Return the kernel's clock status; None where there is none, as outside Linux or in some sandboxes."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    query = ctypes.create_string_buffer(512)  # struct timex, which is smaller; all zero changes nothing
    state = adjtimex(query)
    return None if state < 0 else state != _CLOCK_NOT_SYNCHRONISED


CHECKS = (
    Check("shared memory", shared_memory, Where.HERE, "Mount a tmpfs at /dev/shm."),
    Check("open files", open_files, Where.HERE, "Raise it with `ulimit -n 65536`."),
    Check("clock", clock, Where.HERE, "Run chrony or systemd-timesyncd."),
)

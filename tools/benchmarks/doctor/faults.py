"""Faults that `dash-dist doctor` must name: how each is made for one call, and the finding that is expected.

Knows shells, mounts, GPU memory and names of findings; does not call the doctor. Nothing lasts beyond the call: mounts
are of a namespace of its own, and limits and variables of its process.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DIRECTORY = "$DOCTOR_DIRECTORY"
"""In `before`: the folder that the doctor is told to keep runs in."""
_MOUNT_FULL_DISK = f'mount -t tmpfs -o size=64m tmpfs "{_DIRECTORY}"'
_MOUNT_SHARED_MEMORY = "mount -t tmpfs -o size=16m tmpfs /dev/shm"
_HELD_SHARE = 0.8
"""Of a GPU's free memory. The rest is enough for the doctor's own checks on GPUs of 80 GiB and more."""
_HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info(0)
held = torch.empty(int(float(sys.argv[1]) * free), dtype=torch.uint8, device="cuda:0")
print(held.numel(), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Fault:
    """A fault and the finding that must name it.

    Attributes:
        before: shell commands that run before the doctor, in its own process.
        check, status: name and status of the finding. A name that ends in * stands for all that begin so.
        in_namespace: `before` mounts, so that the process needs a mount namespace of its own.
        holds_memory: another process holds most of the memory of GPU 0.
        skipped: reason why this machine cannot make it; empty where it can.
    """

    name: str
    check: str
    status: str
    before: str = ""
    in_namespace: bool = False
    holds_memory: bool = False
    skipped: str = ""

    @property
    def made_by(self) -> str:
        """Description for the results."""
        if self.holds_memory:
            return f"another process that holds {_HELD_SHARE:.0%} of the free memory of GPU 0"
        where = " in a mount namespace of its own" if self.in_namespace else ""
        return f"`{self.before}`{where}" if self.before else "-"

    def command(self, doctor: list[str]) -> list[str]:
        """Return the command that runs `doctor` under the fault."""
        shell = ["bash", "-c", f'{self.before or ":"} && exec "$@"', "doctor", *doctor]
        return ["unshare", "--mount", *shell] if self.in_namespace else shell


def faults(gpus: int) -> list[Fault]:
    """Return all faults, for a machine with this number of GPUs that PyTorch can use."""
    no_mount = _cannot_mount()
    no_gpu = "" if gpus else "no CUDA device"
    left = ",".join(map(str, range(gpus - 1)))
    limit = "ulimit -f 204800"  # KiB: the doctor writes 256 MiB, and Ray's object store is below this limit
    return [
        Fault("wrong network interface", "NCCL_SOCKET_IFNAME", "failure", "export NCCL_SOCKET_IFNAME=absent0"),
        Fault("full disk", "storage of *", "failure", limit if no_mount else _MOUNT_FULL_DISK, not no_mount),
        Fault("little shared memory", "shared memory", "failure", _MOUNT_SHARED_MEMORY, True, skipped=no_mount),
        Fault("few open files", "open files", "failure", "ulimit -n 512"),
        Fault("GPU memory held", "GPU 0", "warning", holds_memory=True, skipped=no_gpu),
        # With none left, no run can start; with one of several hidden, a run is smaller than it could be.
        Fault(
            "hidden GPU",
            "GPUs",
            "warning" if left else "failure",
            f"export CUDA_VISIBLE_DEVICES={left}",
            skipped=no_gpu,
        ),
        Fault(
            "Triton cache not writable",
            "Triton cache",
            "failure",
            "export TRITON_CACHE_DIR=/dev/null/cache",
            skipped=no_gpu,
        ),
        Fault(
            "capped clock",
            "GPU 0 clock",
            "warning",
            "nvidia-smi -lgc 600",
            skipped="never made: it would change the GPU for other users; tests/doctor/test_gpu_checks.py covers it",
        ),
    ]


@functools.cache
def _cannot_mount() -> str:
    """Return the reason why this process cannot mount in a namespace of its own; empty where it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder],
                capture_output=True,
                text=True,
            )
        except OSError as error:
            return f"cannot mount: {error}"
    return f"cannot mount: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def held_memory(fault: Fault) -> Iterator[None]:
    """Hold GPU memory in another process meanwhile, for a fault that asks for it.

    Raises RuntimeError if that process fails.
    """
    if not fault.holds_memory:
        yield
        return
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(_HELD_SHARE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None  # both are pipes
        assert holder.stdout is not None
        try:
            if not holder.stdout.readline():
                raise RuntimeError("the process that should hold GPU memory has failed")
            yield
        finally:
            holder.stdin.close()  # it ends


def found(fault: Fault, findings: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    """Tell whether the fault's finding is there, with advice, and was not there without the fault."""
    return any(_names(fault, one) and one["advice"] for one in findings) and not any(
        _names(fault, one) for one in before
    )


def _names(fault: Fault, finding: dict[str, Any]) -> bool:
    name, check = finding["name"], fault.check
    fits = name.startswith(check[:-1]) if check.endswith("*") else name == check
    return fits and finding["status"] == fault.status

"""Host memory that GPUs copy to: blocks that are allocated once and used again in every step.

Knows the memory of the machine and of the process's container; does not know what the blocks hold.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from dash_dist.errors import RankError

BLOCK_BYTES = 2**26
"""Power of two, to which torch's allocator of pinned memory rounds up."""
_GIB = 2**30
LEFT_FREE = 2 * _GIB
"""Bytes that the data loader, checkpoints and the system need beside the blocks."""
_CGROUP = Path("/sys/fs/cgroup")


class HostPool:
    """Blocks of `BLOCK_BYTES` bytes, uint8; page-locked ones are slow to allocate, and so are kept.

    Args:
        pinned: page-locked, as GPUs want them for copies beside computation.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self.allocated = 0
        """Blocks in all, free or not."""

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    def take(self, size: int) -> list[torch.Tensor]:
        """Return blocks for so many bytes.

        Raises:
            RankError: the host has too little memory left.
        """
        count = -(-size // BLOCK_BYTES)
        missing = count - len(self._free)
        if missing > 0:
            held = f" more at this rank, beside {self.allocated * BLOCK_BYTES / _GIB:.1f} GiB that it has"
            require_host_bytes(
                missing * BLOCK_BYTES,
                "parallel.offload_activations",
                held,
                "lower parallel.offload_activations, raise parallel.context",
            )
            for _ in range(missing):
                self._free.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._pinned))
                self.allocated += 1
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[torch.Tensor]) -> None:
        """Take blocks back that hold nothing any more."""
        self._free.extend(blocks)


def require_host_bytes(size: int, what: str, held: str, remedy: str) -> None:
    """Refuse an allocation that would leave the host less than `LEFT_FREE`.

    Args:
        size: bytes.
        what: needs them, as the message begins.
        held: where they are needed, and what is there already.
        remedy: what to change, beside giving the machine more memory.

    Raises:
        RankError: the host has too little memory left.
    """
    available = available_host_bytes()
    if size + LEFT_FREE > available:
        raise RankError(
            f"{what} needs {size / _GIB:.1f} GiB of host memory{held}, and {available / _GIB:.1f} GiB are available, "
            f"of which {LEFT_FREE / _GIB:.0f} GiB stay free: {remedy}, or give the container or machine more memory"
        )


def available_host_bytes() -> int:
    """Return the bytes that this process can still allocate: of the machine, or of its container if that has less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        reclaimable = _reclaimable((_CGROUP / "memory.stat").read_text())
    except (OSError, ValueError):
        return available  # no container, or one of another kind
    return available if limit == "max" else min(available, int(limit) - used + reclaimable)


def _reclaimable(statistics: str) -> int:
    """Return the bytes of cached files, which `memory.current` counts and the kernel frees when they are needed."""
    values = dict(line.split() for line in statistics.splitlines())
    return int(values.get("inactive_file", 0))

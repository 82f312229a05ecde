"""Copies of tensors in host memory, from which a checkpoint is written while training changes the tensors.

Knows memory and tensors; does not know files.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from dash_dist.errors import RankError
from dash_dist.megatron.host_memory import require_host_bytes

_GIB = 2**30
_ALIGNMENT = 512
_PIECE = 2**30
"""Bytes that are allocated between two looks at the memory that is left."""

_REMEDY = "set checkpoint.asynchronous to false, shard the state over more ranks (parallel.distributed_optimizer)"


class HostCopies:
    """Memory for copies, allocated once and used again by every checkpoint.

    Page-locked for a GPU, which then copies at the speed of its link. Page-locking takes seconds, which `prepare`
    spends in a thread. A forked process shares the memory: it sees what is copied there later, and no page is copied.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._unlocking: weakref.finalize[[int], HostCopies] | None = None
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    def prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to allocate memory for copies of these tensors; returns at once."""
        if self._thread is None and _size(tensors) > len(self._memory):
            self._start(tensors)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return contiguous copies of the tensors, which are complete. Copies of earlier calls are overwritten.

        Raises:
            RankError: the host has too little memory left.
        """
        self._wait()
        if _size(tensors) > len(self._memory):
            self._start(tensors)
            self._wait()
            if self._problem is not None:
                raise self._problem
        copies, first = [], 0
        for tensor in tensors:
            memory = self._memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(memory.copy_(tensor, non_blocking=True))
            first += _aligned(tensor.nbytes)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return copies

    def _start(self, tensors: Sequence[torch.Tensor]) -> None:
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        # CUDA keeps an error for the thread that made it: in this one, it would come up in the next kernel.
        self._thread = threading.Thread(
            target=self._allocate, args=(_size(tensors), device), name="host copies", daemon=True
        )
        self._thread.start()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _allocate(self, size: int, device: torch.device | None) -> None:
        self._problem = None
        self._release()
        try:
            # Shared with forked processes. Private pages that a GPU writes to would be copied by every fork.
            memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
            for first in range(0, size, _PIECE):
                # The ranks of a host allocate at once: each sees what the others have taken.
                require_host_bytes(size - first, "a checkpoint in the background", " more at this rank", _REMEDY)
                memory[first : first + _PIECE].zero_()  # locking pages that are there holds up CUDA for less time
            if device is not None:
                self._unlocking = weakref.finalize(self, _unlock, _lock(memory, device))
                self._unlocking.atexit = False
            self._memory = memory
        except Exception as error:  # of any kind: `copy` tries again, and raises it
            self._problem = error.with_traceback(None)  # which would keep the memory

    def _release(self) -> None:
        """Unlock the memory, then give it back: CUDA would take for locked whatever is mapped there next."""
        if self._unlocking is not None:
            self._unlocking()
            self._unlocking = None
        self._memory = torch.empty(0, dtype=torch.uint8)


def is_written_by_gpu(tensor: torch.Tensor) -> bool:
    """Return whether a forked process would see the tensor change: it is on a GPU, or page-locked for one."""
    return tensor.is_cuda or tensor.is_pinned()


def _lock(memory: torch.Tensor, device: torch.device) -> int:
    """Page-lock memory for a GPU; returns its address. Raises RankError."""
    cudart: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    with torch.cuda.device(device):
        code = int(cudart.cudaHostRegister(address, len(memory), 0))
    if code:
        raise RankError(
            f"CUDA cannot page-lock {len(memory) / _GIB:.1f} GiB of host memory for checkpoints (error {code}): set "
            "checkpoint.asynchronous to false, or give the container or machine more memory"
        )
    return address


def _unlock(address: int) -> None:
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(address)


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

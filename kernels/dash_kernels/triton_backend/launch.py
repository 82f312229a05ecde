"""Tuned launch configurations, per kernel and GPU generation: a small table instead of autotuning, so that a first call
compiles each kernel once and no sequence length compiles anything again.

The rows for Hopper were measured on an H100 (docs/kernel-log.md). Other GPUs run the conservative ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dash_kernels.backend import is_hopper


@dataclass(frozen=True)
class LaunchOptions:
    """rows: of a program's tile (where a kernel has the choice); block: summaries per step; resident: programs of a
    persistent kernel per multiprocessor; tensor_maps: K and V through Hopper's bulk copy engine; max_registers: of a
    thread, where fewer let another program share the multiprocessor.
    """

    num_warps: int
    num_stages: int
    block: int
    rows: int = 64
    resident: int = 1
    tensor_maps: bool = False
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


# By kernel and padded head dim, for 16-bit inputs.
_HOPPER = {
    ("route", 64): LaunchOptions(8, 2, 64, rows=128, resident=2, max_registers=128),
    ("route", 128): LaunchOptions(8, 2, 64, rows=128, resident=2, max_registers=128),
    ("attend", 64): LaunchOptions(4, 3, 32, resident=2, tensor_maps=True),
    ("attend", 128): LaunchOptions(4, 3, 32, resident=2, tensor_maps=True),
    ("attend", 256): LaunchOptions(4, 1, 32),
    ("queries", 64): LaunchOptions(4, 3, 16, resident=2, tensor_maps=True),
    ("queries", 128): LaunchOptions(4, 3, 16, resident=2, tensor_maps=True),
    ("queries", 256): LaunchOptions(4, 1, 32),
    ("keys", 64): LaunchOptions(4, 2, 64, resident=2),
    ("keys", 128): LaunchOptions(4, 2, 64, resident=2),
    ("keys", 256): LaunchOptions(4, 1, 64),
}
# What fits everywhere: float32 inputs, head dims without a row above, other GPUs.
_ANYWHERE = {
    "route": LaunchOptions(4, 1, 32, resident=2),
    "attend": LaunchOptions(4, 1, 32, resident=2),
    "queries": LaunchOptions(4, 1, 16, resident=2),
    "keys": LaunchOptions(8, 1, 32, resident=1),
}


def launch_options(kernel: str, q: torch.Tensor) -> LaunchOptions:
    if is_hopper(q) and q.element_size() == 2:
        padded_dim = max(1 << (q.shape[-1] - 1).bit_length(), 64)
        return _HOPPER.get((kernel, padded_dim), _ANYWHERE[kernel])
    return _ANYWHERE[kernel]

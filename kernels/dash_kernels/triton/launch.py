"""Tuned launch options of the portable kernels, by kernel and architecture.

A small table replaces autotuning: a first call compiles each kernel once, and no sequence length compiles one
again. The rows for Hopper were measured on an H100 (docs/kernel-log.md). Other GPUs run the conservative rows.
Knows devices and head dims; does not know the kernels' arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dash_kernels.device import INTERPRETER, Device
from dash_kernels.limits import padded


@dataclass(frozen=True)
class LaunchOptions:
    """Launch options of one kernel.

    block:         summaries per step.
    rows:          rows of a program's tile, where a kernel has the choice.
    resident:      programs of a persistent kernel per multiprocessor.
    tensor_maps:   Hopper: load K and V through the bulk copy engine (TMA).
    max_registers: Hopper: registers per thread (maxnreg), where fewer let another program share the multiprocessor.
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
_SM90 = {
    ("route", 64): LaunchOptions(8, 2, 64, rows=128, resident=2, max_registers=128),
    ("route", 128): LaunchOptions(8, 2, 64, rows=128, resident=2, max_registers=128),
    ("attend", 64): LaunchOptions(4, 3, 32, resident=2, tensor_maps=True),
    ("attend", 128): LaunchOptions(4, 3, 32, resident=2, tensor_maps=True),
    ("attend", 256): LaunchOptions(4, 1, 32),
    ("query_gradient", 64): LaunchOptions(4, 3, 16, resident=2, tensor_maps=True),
    ("query_gradient", 128): LaunchOptions(4, 3, 16, resident=2, tensor_maps=True),
    ("query_gradient", 256): LaunchOptions(4, 1, 32),
    ("key_gradient", 64): LaunchOptions(4, 2, 64, resident=2),
    ("key_gradient", 128): LaunchOptions(4, 2, 64, resident=2),
    ("key_gradient", 256): LaunchOptions(4, 1, 64),
}
# Options that fit everywhere: float32 inputs, head dims without a row above, other GPUs.
_ANYWHERE = {
    "route": LaunchOptions(4, 1, 32, resident=2),
    "attend": LaunchOptions(4, 1, 32, resident=2),
    "query_gradient": LaunchOptions(4, 1, 16, resident=2),
    "key_gradient": LaunchOptions(8, 1, 32, resident=1),
}


# The interpreter runs Hopper's rows, so that tests on the CPU walk the code of the tuned kernels.
_TUNED = {"sm_90": _SM90, INTERPRETER: _SM90}


def launch_options(kernel: str, q: torch.Tensor) -> LaunchOptions:
    """Launch options of a kernel for queries of this dtype, head dim and device."""
    tuned = _TUNED.get(Device.of(q.device).architecture, {}) if q.element_size() == 2 else {}
    return tuned.get((kernel, max(padded(q.shape[-1]), 64)), _ANYWHERE[kernel])

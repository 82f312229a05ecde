"""Tuned launch configurations, per kernel and GPU generation: a small table instead of autotuning, so that a first call
compiles each kernel once and no sequence length compiles anything again.

The rows for Hopper were measured on an H100 (docs/kernel-log.md). Other GPUs run the conservative ones.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from dataclasses import dataclass

import torch

from dash_kernels.backend import is_hopper
from dash_kernels.chunks import ChunkGrid
from dash_kernels.triton_backend.tiles import TILE_ROWS, TileShape


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


@dataclass(frozen=True)
class PairOptions:
    """Of a kernel on pairs of tiles. ring: chunks in flight; block: chunks whose biases are computed at a time;
    registers of a thread: of the second tile partition (the first has what is left), of lister and loader, and at the
    start.
    """

    ring: int
    block: int
    tile_registers: int
    helper_registers: int
    max_registers: int


_PAIRS = {
    ("attend", 64): PairOptions(4, 32, tile_registers=232, helper_registers=40, max_registers=168),
    ("attend", 128): PairOptions(4, 32, tile_registers=232, helper_registers=40, max_registers=168),
    ("queries", 64): PairOptions(4, 16, tile_registers=232, helper_registers=40, max_registers=168),
    ("queries", 128): PairOptions(4, 16, tile_registers=232, helper_registers=40, max_registers=168),
}


@dataclass(frozen=True)
class GatherOptions:
    """Of the kernel that gathers queries. ring: tiles in flight; registers of a thread: of the second score partition
    (the first has what is left), of the adder, of lister and gatherer, and at the start.
    """

    ring: int
    score_registers: int
    adder_registers: int
    helper_registers: int
    max_registers: int


# By head dim: of those that were run on a GPU.
_GATHERED = {
    128: GatherOptions(4, score_registers=152, adder_registers=168, helper_registers=40, max_registers=128),
}

# Gluon is young and changes from release to release: these are the ones the kernels were compiled with.
_GLUON_RELEASES = ((3, 6), (3, 7))


def pair_options(kernel: str, q: torch.Tensor, tile: TileShape, chunks: ChunkGrid) -> PairOptions | None:
    """Options of a kernel on pairs of tiles; None where the kernel of one tile must do: other GPUs and dtypes, chunks
    of other sizes or incomplete ones, groups that a tile must pad, a single tile to a chunk.
    """
    return _PAIRS.get((kernel, tile.head_dim)) if _specialised_warps(q, tile, chunks) else None


def gather_options(q: torch.Tensor, tile: TileShape, chunks: ChunkGrid) -> GatherOptions | None:
    """Options of the kernel that gathers queries; None where the kernel without specialised warps must do, as in
    `pair_options`.
    """
    return _GATHERED.get(tile.head_dim) if _specialised_warps(q, tile, chunks) else None


def _specialised_warps(q: torch.Tensor, tile: TileShape, chunks: ChunkGrid) -> bool:
    """Whether there are kernels with specialised warps for these tiles."""
    if q.dtype != torch.bfloat16 or not is_hopper(q) or not _gluon_works():
        return False
    if tile.chunk_size != 64 or tile.group * tile.tokens != TILE_ROWS or tile.per_chunk % 2:
        return False
    return chunks.complete_to(tile.chunk_size)


@functools.cache
def _gluon_works() -> bool:
    """Whether this Triton has been tried, and is not its interpreter, which has no Gluon."""
    release = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    return release in _GLUON_RELEASES and os.environ.get("TRITON_INTERPRET") != "1"

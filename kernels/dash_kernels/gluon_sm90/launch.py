"""Launch options of the warp-specialised kernels, and the choice between them and the portable kernels.

Knows the support table and Triton's release; does not import Gluon.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

import torch

from dash_kernels.chunks import ChunkGrid
from dash_kernels.device import Device
from dash_kernels.support import specialised
from dash_kernels.triton.tiles import TileShape


@dataclass(frozen=True)
class PairOptions:
    """Launch options of a kernel on pairs of tiles.

    ring:             chunks in flight.
    block:            chunks whose biases are computed at a time.
    tile_registers:   registers per thread of the second tile partition; the first one gets the remainder.
    helper_registers: registers per thread of lister and loader.
    max_registers:    registers per thread at the start.
    """

    ring: int
    block: int
    tile_registers: int
    helper_registers: int
    max_registers: int


_PAIRS = {
    ("attend", 64): PairOptions(4, 32, tile_registers=232, helper_registers=40, max_registers=168),
    ("attend", 128): PairOptions(4, 32, tile_registers=232, helper_registers=40, max_registers=168),
    ("query_gradient", 64): PairOptions(4, 16, tile_registers=232, helper_registers=40, max_registers=168),
    ("query_gradient", 128): PairOptions(4, 16, tile_registers=232, helper_registers=40, max_registers=168),
}


@dataclass(frozen=True)
class GatherOptions:
    """Launch options of the kernel that gathers queries.

    ring:             tiles in flight.
    score_registers:  registers per thread of the second score partition; the first one gets the remainder.
    adder_registers:  registers per thread of the adder.
    helper_registers: registers per thread of lister and gatherer.
    max_registers:    registers per thread at the start.
    """

    ring: int
    score_registers: int
    adder_registers: int
    helper_registers: int
    max_registers: int


_GATHERED = {
    128: GatherOptions(4, score_registers=152, adder_registers=168, helper_registers=40, max_registers=128),
}

# Releases that these kernels were compiled with: Gluon changes between releases.
_GLUON_RELEASES = ((3, 6), (3, 7))


def pair_options(kernel: str, q: torch.Tensor, tile: TileShape, chunks: ChunkGrid) -> PairOptions | None:
    """Options of a kernel on pairs of tiles, or None where the portable kernel of one tile runs."""
    return _PAIRS[kernel, tile.head_dim] if _selected(kernel, q, tile, chunks) else None


def gather_options(q: torch.Tensor, tile: TileShape, chunks: ChunkGrid) -> GatherOptions | None:
    """Options of the kernel that gathers queries, or None where the portable kernel runs."""
    return _GATHERED[tile.head_dim] if _selected("key_gradient", q, tile, chunks) else None


def _selected(stage: str, q: torch.Tensor, tile: TileShape, chunks: ChunkGrid) -> bool:
    device = Device.of(q.device)
    supported = specialised(stage, device, q.dtype, tile.head_dim, tile.chunk_size, tile.group)
    return supported and _gluon_works() and chunks.complete_to(tile.chunk_size)


@functools.cache
def _gluon_works() -> bool:
    """Tell whether the kernels were tried with this release of Triton."""
    release = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    return release in _GLUON_RELEASES

"""The support table: which kernels take which calls. `python -m dash_kernels.support` prints it as Markdown.

Knows architectures, dtypes and sizes; does not know how a kernel works, nor its launch options.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch

from dash_kernels.device import INTERPRETER, Device
from dash_kernels.limits import MAX_SMALL_CHUNK, MAX_TRITON_GROUP, MAX_TRITON_HEAD_DIM, fits_small_chunk

STAGES = ("summarize", "route", "reached", "attend", "row_dots", "query_gradient", "key_gradient")
OTHER_CUDA = "other CUDA"


@dataclass(frozen=True)
class KernelSet:
    """One row of the table.

    package:       subpackage of `dash_kernels`.
    architectures: `Device.architecture`; OTHER_CUDA stands for CUDA GPUs that no row of the package names.
    chunk_sizes:   None for any; a listed size also needs every chunk to be complete.
    small_chunks:  limits a chunk to `limits.MAX_SMALL_CHUNK`.
    """

    package: str
    stages: tuple[str, ...]
    architectures: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: range | tuple[int, ...] = range(1, MAX_TRITON_HEAD_DIM + 1)
    groups: range | tuple[int, ...] = range(1, MAX_TRITON_GROUP + 1)
    chunk_sizes: tuple[int, ...] | None = None
    small_chunks: bool = False

    def takes_chunks(self, head_dim: int, chunk_size: int) -> bool:
        listed: Container[int] = (chunk_size,) if self.chunk_sizes is None else self.chunk_sizes
        return chunk_size in listed and (not self.small_chunks or fits_small_chunk(head_dim, chunk_size))


_HALF = (torch.float16, torch.bfloat16)
_TUNED = ("sm_90", INTERPRETER)
_SPECIALISED_GROUPS = (2, 4, 8, 16)  # a tile without padding, and an even number of tiles to a chunk
SUPPORT = (
    KernelSet("triton", STAGES, _TUNED, _HALF),
    KernelSet("triton", STAGES, _TUNED, (torch.float32,), small_chunks=True),
    KernelSet("triton", STAGES, (OTHER_CUDA,), _HALF, small_chunks=True),
    KernelSet(
        "gluon_sm90", ("attend", "query_gradient"), ("sm_90",), (torch.bfloat16,), (64, 128), _SPECIALISED_GROUPS, (64,)
    ),
    # Head dim 64 was never run on a GPU.
    KernelSet("gluon_sm90", ("key_gradient",), ("sm_90",), (torch.bfloat16,), (128,), _SPECIALISED_GROUPS, (64,)),
)


def _rows(package: str, device: Device) -> list[KernelSet]:
    rows = [row for row in SUPPORT if row.package == package]
    named = [row for row in rows if device.architecture in row.architectures]
    return named or [row for row in rows if device.is_cuda and OTHER_CUDA in row.architectures]


def obstacle(device: Device, dtype: torch.dtype, head_dim: int, chunk_size: int, group: int) -> str | None:
    """Name the first property of a call that the portable kernels do not support, or None."""
    rows = _rows("triton", device)
    if not rows:
        return "the kernels are made for CUDA GPUs"
    if dtype == torch.float64:
        return "float64 is computed by the eager backend"
    row = next((row for row in rows if dtype in row.dtypes), None)
    if row is None:
        return f"{str(dtype).removeprefix('torch.')} fits into the shared memory of Hopper GPUs only"
    if head_dim not in row.head_dims:
        return f"head_dim is {head_dim}, the kernels take up to {max(row.head_dims)}"
    if group not in row.groups:
        return f"{group} query heads share a KV head, the kernels take up to {max(row.groups)}"
    if not row.takes_chunks(head_dim, chunk_size):
        return f"head_dim {head_dim} with chunk_size {chunk_size} in {dtype} does not fit into shared memory"
    return None


def specialised(stage: str, device: Device, dtype: torch.dtype, head_dim: int, chunk_size: int, group: int) -> bool:
    """Tell whether a stage has a kernel for this architecture alone; its chunks must be complete."""
    return any(
        stage in row.stages
        and dtype in row.dtypes
        and head_dim in row.head_dims
        and group in row.groups
        and row.takes_chunks(head_dim, chunk_size)
        for row in _rows("gluon_sm90", device)
    )


def markdown() -> str:
    """The table as Markdown."""
    lines = [
        "| kernels | stages | architectures | dtypes | head dims | chunk sizes | heads per KV head |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in SUPPORT:
        chunks = "any" if row.chunk_sizes is None else _numbers(row.chunk_sizes) + ", complete"
        if row.small_chunks:
            chunks = f"padded tokens x head dim up to {MAX_SMALL_CHUNK}"
        cells = (
            f"`{row.package}`",
            "all" if row.stages == STAGES else ", ".join(f"`{stage}`" for stage in row.stages),
            ", ".join(row.architectures),
            ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes),
            _numbers(row.head_dims),
            chunks,
            _numbers(row.groups),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _numbers(values: range | tuple[int, ...]) -> str:
    return f"{min(values)} to {max(values)}" if isinstance(values, range) else ", ".join(map(str, values))


if __name__ == "__main__":
    print(markdown())

"""Cast of rows to FP8 in Triton: one pass over memory finds a row's scale and writes the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.limits import FP8_LARGEST, FP8_SMALLEST

_LARGEST, _SMALLEST = tl.constexpr(FP8_LARGEST), tl.constexpr(FP8_SMALLEST)
_WIDEST = 16_384
"""Columns that a program holds in registers; longer rows are read twice, the second time from the caches."""
_PER_THREAD = 16
_MOST_WARPS = 16


def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and scales of the contiguous x [M, K], see `dash_kernels.fp8.cast_rows`."""
    rows, columns = x.shape
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(columns), _WIDEST)
    warps = min(max(block // (32 * _PER_THREAD), 1), _MOST_WARPS)
    cast_rows_kernel[(rows,)](x, values, scales, COLUMNS=columns, BLOCK=block, num_warps=warps)
    return values, scales


@triton.jit
def cast_rows_kernel(x_ptr, values_ptr, scales_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * COLUMNS
    values_ptr += row * COLUMNS
    column = tl.arange(0, BLOCK)
    WHOLE: tl.constexpr = COLUMNS <= BLOCK
    x = tl.load(x_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)  # [BLOCK]
    largest = tl.abs(x)
    if not WHOLE:
        for start in range(BLOCK, COLUMNS, BLOCK):
            later = tl.load(x_ptr + start + column, mask=start + column < COLUMNS, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(later))
    most = tl.maximum(tl.max(largest, 0), _SMALLEST)
    tl.store(scales_ptr + row, tl.div_rn(most, _LARGEST))
    factor = tl.div_rn(_LARGEST, most)
    tl.store(values_ptr + column, (x * factor).to(tl.float8e4nv), mask=column < COLUMNS)
    if not WHOLE:
        for start in range(BLOCK, COLUMNS, BLOCK):
            later = tl.load(x_ptr + start + column, mask=start + column < COLUMNS, other=0.0).to(tl.float32)
            tl.store(values_ptr + start + column, (later * factor).to(tl.float8e4nv), mask=start + column < COLUMNS)

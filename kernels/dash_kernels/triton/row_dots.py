"""First step of every row's backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def row_dots(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """sum(grad * out) over the head dim, [B, T, Hq] float32, without a float32 copy of either."""
    dots = torch.empty(grad.shape[:3], dtype=torch.float32, device=grad.device)
    head_dim, rows = grad.shape[3], dots.numel()
    block = 32
    row_dots_kernel[(triton.cdiv(rows, block),)](
        grad.contiguous(), out.contiguous(), dots, rows, D=head_dim, BD=triton.next_power_of_2(head_dim), ROWS=block
    )
    return dots


@triton.jit(do_not_specialize=["rows"])
def row_dots_kernel(grad_ptr, out_ptr, dots_ptr, rows, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    offsets = row[:, None] * D + column[None, :]
    mask = (row < rows)[:, None] & (column < D)[None, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dots_ptr + row, tl.sum(grad * out, axis=1), mask=row < rows)

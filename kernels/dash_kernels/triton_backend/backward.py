"""The backward passes in Triton, put together: of a whole part at once, or part by part for exchanges that bring K and
V in pieces. No floating-point atomics: whatever is added is added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, GradientSums, Part, Routing
from dash_kernels.triton_backend.backward_keys import key_gradients
from dash_kernels.triton_backend.backward_queries import query_gradients


def backward_whole(
    grad: torch.Tensor,
    q: torch.Tensor,
    query_chunks: ChunkGrid,
    part: Part,
    summary_query: torch.Tensor,
    summaries: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, q = grad.contiguous(), q.contiguous()
    delta = row_dots(grad, out)
    dq = torch.empty_like(q)
    ratio = torch.empty_like(delta)
    query_gradients(grad, q, query_chunks, part, summaries, routing, lse, delta, spec, dq=dq, row_sum=ratio, whole=True)
    dkv, dsummary_query = key_gradients(
        grad, q, query_chunks, part, summary_query, summaries, routing, lse, delta, spec, ratio
    )
    return dq, dkv, dsummary_query


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    query_chunks: ChunkGrid,
    part: Part,
    summary_query: torch.Tensor,
    summaries: torch.Tensor,
    routing: Routing,
    lse: torch.Tensor,
    delta: torch.Tensor,
    spec: AttentionSpec,
    sums: GradientSums,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, q = grad.contiguous(), q.contiguous()
    query_gradients(
        grad, q, query_chunks, part, summaries, routing, lse, delta, spec,
        dq=sums.dq, row_sum=sums.weighted_sum, whole=False,
    )  # fmt: skip
    return key_gradients(grad, q, query_chunks, part, summary_query, summaries, routing, lse, delta, spec, ratio=None)


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

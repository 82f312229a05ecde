"""Stage 1 in Triton: one program per chunk and KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.spec import AttentionSpec
from dash_kernels.triton_backend.tiles import chunk_offsets, summary_offset


def summarize(k: torch.Tensor, summary_query: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    batch, seq_len, kv_heads, head_dim = k.shape
    complete = seq_len // spec.chunk_size
    summaries = torch.empty(batch, complete, kv_heads, head_dim, dtype=torch.float32, device=k.device)
    if complete:
        summary_fwd_kernel[(complete, batch * kv_heads)](
            k.contiguous(), summary_query.contiguous(), summaries, seq_len, complete, spec.scale, **_constants(k, spec)
        )
    return summaries


def summarize_backward(
    grad: torch.Tensor, k: torch.Tensor, summary_query: torch.Tensor, spec: AttentionSpec, dk: torch.Tensor
) -> torch.Tensor:
    batch, seq_len, kv_heads, _ = k.shape
    complete = seq_len // spec.chunk_size
    # One partial gradient of summary_query per chunk, summed in a fixed order: no atomics.
    parts = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    if complete:
        summary_bwd_kernel[(complete, batch * kv_heads)](
            k.contiguous(), summary_query.contiguous(), grad.contiguous(), dk, parts, seq_len, complete, spec.scale,
            **_constants(k, spec),
        )  # fmt: skip
    return parts.sum((0, 1))


def _constants(k: torch.Tensor, spec: AttentionSpec) -> dict[str, int]:
    return {
        "HK": k.shape[2],
        "C": spec.chunk_size,
        "BC": triton.next_power_of_2(spec.chunk_size),
        "D": k.shape[3],
        "BD": triton.next_power_of_2(k.shape[3]),
    }


@triton.jit(do_not_specialize=["T", "n"])
def summary_fwd_kernel(
    k_ptr, query_ptr, summary_ptr, T, n, scale,
    HK: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    chunk, batch_head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BD)
    k, weights = _weights(k_ptr, query_ptr, chunk, batch_head, T, scale, HK, C, BC, D, BD)[:2]
    summary = tl.sum(weights[:, None] * k, axis=0)  # [BD]
    tl.store(summary_ptr + summary_offset(chunk, batch_head, n, HK, D) + column, summary, mask=column < D)


@triton.jit(do_not_specialize=["T", "n"])
def summary_bwd_kernel(
    k_ptr, query_ptr, grad_ptr, dk_ptr, dquery_part_ptr, T, n, scale,
    HK: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    chunk, batch_head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BD)
    k, weights, query = _weights(k_ptr, query_ptr, chunk, batch_head, T, scale, HK, C, BC, D, BD)
    part = summary_offset(chunk, batch_head, n, HK, D) + column
    grad = tl.load(grad_ptr + part, mask=column < D, other=0.0)
    along = tl.sum(k * grad[None, :], axis=1)  # [BC]
    dlogits = weights * (along - tl.sum(weights * along, axis=0)) * scale
    offsets, mask = chunk_offsets(chunk, batch_head, T, HK, C, BC, D, BD)
    dk = tl.load(dk_ptr + offsets, mask=mask, other=0.0)
    dk += weights[:, None] * grad[None, :] + dlogits[:, None] * query[None, :]
    tl.store(dk_ptr + offsets, dk, mask=mask)
    tl.store(dquery_part_ptr + part, tl.sum(dlogits[:, None] * k, axis=0), mask=column < D)


@triton.jit
def _weights(
    k_ptr, query_ptr, chunk, batch_head, T, scale,
    HK: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(keys of the chunk [BC, BD], their weights [BC], summary query [BD]), float32."""
    column = tl.arange(0, BD)
    offsets, mask = chunk_offsets(chunk, batch_head, T, HK, C, BC, D, BD)
    k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    query = tl.load(query_ptr + (batch_head % HK) * D + column, mask=column < D, other=0.0).to(tl.float32)
    logits = tl.where(tl.arange(0, BC) < C, tl.sum(k * query[None, :], axis=1) * scale, -float("inf"))
    weights = tl.exp(logits - tl.max(logits, axis=0))
    return k, weights / tl.sum(weights, axis=0), query

"""Stage 1 in Triton: one program per chunk and KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.chunks import ChunkGrid
from dash_kernels.selection import InfLLMv2
from dash_kernels.selection_scores import stride_means
from dash_kernels.spec import AttentionSpec
from dash_kernels.triton.tiles import load_chunk, load_slot, summary_offset


def summarize(k: torch.Tensor, chunks: ChunkGrid, summary_query: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    if isinstance(spec.selection, InfLLMv2):
        return stride_means(k, chunks, spec)
    batch, seq_len, kv_heads, head_dim = k.shape
    summaries = torch.empty(batch, len(chunks), kv_heads, head_dim, dtype=torch.float32, device=k.device)
    summary_kernel[(len(chunks), batch * kv_heads)](
        k.contiguous(), chunks.on(k.device), summary_query.contiguous(), summaries, seq_len, len(chunks), spec.scale,
        **_constants(k, spec),
    )  # fmt: skip
    return summaries


def _constants(k: torch.Tensor, spec: AttentionSpec) -> dict[str, int]:
    return {
        "HK": k.shape[2],
        "C": spec.chunk_size,
        "BC": triton.next_power_of_2(spec.chunk_size),
        "D": k.shape[3],
        "BD": max(triton.next_power_of_2(k.shape[3]), 16),
    }


@triton.jit(do_not_specialize=["T", "slots"])
def summary_kernel(
    k_ptr, grid_ptr, query_ptr, summary_ptr, T, slots, scale,
    HK: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    slot, batch_head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BD)
    _chunk, start, length, _first = load_slot(grid_ptr, slots, slot)
    k = load_chunk(k_ptr, start, length, batch_head, T, HK, BC, D, BD).to(tl.float32)
    query = tl.load(query_ptr + (batch_head % HK) * D + column, mask=column < D, other=0.0).to(tl.float32)
    summary = tl.sum(summary_weights(k, query, scale, C, BC)[:, None] * k, axis=0)  # [BD]
    summary = tl.where(length == C, summary, 0.0)  # no query is routed to an incomplete chunk
    tl.store(summary_ptr + summary_offset(slot, batch_head, slots, HK, D) + column, summary, mask=column < D)


@triton.jit
def summary_weights(k, query, scale, C: tl.constexpr, BC: tl.constexpr):
    """Weights of a complete chunk's keys k [BC, BD] in its summary, float32.  [BC]"""
    logits = tl.where(tl.arange(0, BC) < C, tl.sum(k * query[None, :], axis=1) * scale, -float("inf"))
    weights = tl.exp(logits - tl.max(logits, axis=0))
    return weights / tl.sum(weights, axis=0)

"""Checks of the tensors of a call. Every error names the value given and the allowed values.

Knows shapes, dtypes and devices; does not know the settings, which `AttentionSpec` checks itself.
"""

from __future__ import annotations

import itertools

import torch

from dash_kernels.chunks import ChunkGrid
from dash_kernels.selection import NSA, STRIDE
from dash_kernels.spec import AttentionSpec, require

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, summary_query: torch.Tensor) -> None:
    """Raises ValueError for tensors outside the domain of `dash_attention`."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require(
            tensor.dim() == 4,
            f"{name} has shape {tuple(tensor.shape)}: give [batch, tokens, heads, head_dim]",
        )
    batch, seq_len, query_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    require(
        min(q.shape) > 0 and kv_heads > 0,
        f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: no dimension may be 0",
    )
    require(k.shape == v.shape, f"k has shape {tuple(k.shape)} but v {tuple(v.shape)}: they must be equal")
    require(
        k.shape == (batch, seq_len, kv_heads, head_dim),
        f"q has shape {tuple(q.shape)} but k {tuple(k.shape)}: batch, tokens and head_dim must be equal",
    )
    require(
        query_heads % kv_heads == 0,
        f"{query_heads} query heads are not a multiple of {kv_heads} KV heads: change the number of heads in q or k",
    )
    require(
        tuple(summary_query.shape) == (kv_heads, head_dim),
        f"summary_query has shape {tuple(summary_query.shape)}: give [KV heads, head_dim] = {(kv_heads, head_dim)}",
    )
    require(
        q.dtype in FLOAT_DTYPES,
        f"q has dtype {q.dtype}: give one of {', '.join(str(dtype) for dtype in FLOAT_DTYPES)}",
    )
    require(
        q.dtype == k.dtype == v.dtype,
        f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: they must be equal",
    )
    require(
        summary_query.dtype in FLOAT_DTYPES,
        f"summary_query has dtype {summary_query.dtype}: give a float dtype",
    )
    devices = {tensor.device for tensor in (q, k, v, summary_query)}
    require(len(devices) == 1, f"tensors are on {sorted(map(str, devices))}: put all four on one device")


def check_summaries(summaries: torch.Tensor | None, k: torch.Tensor, chunks: int, spec: AttentionSpec) -> None:
    """Raises ValueError unless the sequence's summaries are given to the rule that needs them, and to no other.

    k [B, T, Hkv, D] holds the tokens of the sequence or a shard of them.
    """
    if not isinstance(spec.selection, NSA):
        require(summaries is None, "summaries were given, and the rule makes its own of k: pass None")
        return
    shape = (k.shape[0], chunks, k.shape[2], spec.chunk_size // STRIDE * k.shape[3])
    given = None if summaries is None else tuple(summaries.shape)
    require(given == shape, f"summaries are {given}, and NSA selects by its compressed keys: give {shape}")


def sequence_chunks(
    chunks: ChunkGrid | None, cu_seqlens: torch.Tensor | None, q: torch.Tensor, seq_len: int, spec: AttentionSpec
) -> ChunkGrid:
    """The chunks of a sequence of seq_len tokens: as given, by documents, or of one document if both are None.

    q [B, T, Hq, D] holds all tokens of the sequence or a shard of them. Raises ValueError for a mismatch.
    """
    if chunks is not None:
        require(cu_seqlens is None, "chunks and cu_seqlens were both given: give one, they say the same")
        require(chunks.tokens == seq_len, f"chunks has {chunks.tokens} tokens but the sequence {seq_len}")
        require(
            chunks.longest <= spec.chunk_size,
            f"chunks has one of {chunks.longest} tokens: build it with chunk_size {spec.chunk_size}",
        )
        return chunks
    if cu_seqlens is None:
        return ChunkGrid.whole_sequence(seq_len, spec.chunk_size)
    return ChunkGrid.packed(check_cu_seqlens(cu_seqlens, q, seq_len), spec.chunk_size)


def check_cu_seqlens(cu_seqlens: object, q: torch.Tensor, seq_len: int) -> list[int]:
    """The values of cu_seqlens [documents + 1], which cuts a sequence of seq_len tokens into documents.

    q [1, T, Hq, D] holds all tokens of the sequence or a shard of them. Reading a tensor on a GPU waits for the GPU.
    Raises ValueError unless the offsets go from 0 to seq_len and never decrease.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"cu_seqlens is of type {type(cu_seqlens).__name__}: give an int32 tensor [documents + 1]")
    require(cu_seqlens.dtype == torch.int32, f"cu_seqlens has dtype {cu_seqlens.dtype}: give torch.int32")
    require(
        cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2,
        f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: give [documents + 1], at least 2 entries",
    )
    require(
        cu_seqlens.device in (torch.device("cpu"), q.device),
        f"cu_seqlens is on {cu_seqlens.device}: put it on the CPU or on q's device, {q.device}",
    )
    require(
        q.shape[0] == 1,
        f"cu_seqlens was given for q of shape {tuple(q.shape)}: packed documents need batch 1, [1, total tokens, ...]",
    )
    bounds = cu_seqlens.tolist()
    require(bounds[0] == 0, f"cu_seqlens starts at {bounds[0]}: its first entry must be 0")
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        require(
            start <= end,
            f"cu_seqlens falls from {start} to {end} at entry {index + 1}: give offsets that never decrease",
        )
    require(
        bounds[-1] == seq_len,
        f"cu_seqlens ends at {bounds[-1]} but the sequence has {seq_len} tokens: its last entry must be their number",
    )
    return bounds

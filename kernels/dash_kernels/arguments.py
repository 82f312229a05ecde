"""Checks of the arguments of `dash_attention`: every refusal names what was given and what is allowed."""

from __future__ import annotations

import itertools
import math

import torch

from dash_kernels.spec import AttentionSpec

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIN_CHUNK, MAX_CHUNK, CHUNK_STEP = 16, 128, 16


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    chunk_size: int,
    alpha: float,
    routing_scale: float,
    prior_sigma: float | None,
    softmax_scale: float | None,
) -> AttentionSpec:
    """Raises ValueError for anything the function is not defined for; returns the constants of the call."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _require(
            tensor.dim() == 4,
            f"{name} has shape {tuple(tensor.shape)}: give [batch, tokens, heads, head_dim]",
        )
    batch, seq_len, query_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    _require(
        min(q.shape) > 0 and kv_heads > 0,
        f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: no dimension may be 0",
    )
    _require(k.shape == v.shape, f"k has shape {tuple(k.shape)} but v {tuple(v.shape)}: they must be equal")
    _require(
        k.shape == (batch, seq_len, kv_heads, head_dim),
        f"q has shape {tuple(q.shape)} but k {tuple(k.shape)}: batch, tokens and head_dim must be equal",
    )
    _require(
        query_heads % kv_heads == 0,
        f"{query_heads} query heads are not a multiple of {kv_heads} KV heads: change the number of heads in q or k",
    )
    _require(
        tuple(summary_query.shape) == (kv_heads, head_dim),
        f"summary_query has shape {tuple(summary_query.shape)}: give [KV heads, head_dim] = {(kv_heads, head_dim)}",
    )
    _require(
        q.dtype in FLOAT_DTYPES,
        f"q has dtype {q.dtype}: give one of {', '.join(str(dtype) for dtype in FLOAT_DTYPES)}",
    )
    _require(
        q.dtype == k.dtype == v.dtype,
        f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: they must be equal",
    )
    _require(
        summary_query.dtype in FLOAT_DTYPES,
        f"summary_query has dtype {summary_query.dtype}: give a float dtype",
    )
    devices = {tensor.device for tensor in (q, k, v, summary_query)}
    _require(len(devices) == 1, f"tensors are on {sorted(map(str, devices))}: put all four on one device")
    _require(
        isinstance(chunk_size, int) and MIN_CHUNK <= chunk_size <= MAX_CHUNK and chunk_size % CHUNK_STEP == 0,
        f"chunk_size is {chunk_size!r}: give a multiple of {CHUNK_STEP} from {MIN_CHUNK} to {MAX_CHUNK}",
    )
    _require(
        _is_positive(alpha) and 1 < alpha <= 2,
        f"alpha is {alpha!r}: give a number in (1, 2]; 1.5 is the default and the fast path",
    )
    _require(_is_positive(routing_scale), f"routing_scale is {routing_scale!r}: give a positive number")
    _require(
        prior_sigma is None or _is_positive(prior_sigma),
        f"prior_sigma is {prior_sigma!r}: give None or a positive number",
    )
    _require(
        softmax_scale is None or _is_positive(softmax_scale),
        f"softmax_scale is {softmax_scale!r}: give None for 1 / sqrt(head_dim), or a positive number",
    )
    return AttentionSpec(
        chunk_size=chunk_size,
        alpha=float(alpha),
        routing_scale=float(routing_scale),
        prior_sigma=None if prior_sigma is None else float(prior_sigma),
        scale=1 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale),
    )


def check_cu_seqlens(cu_seqlens: object, q: torch.Tensor, seq_len: int) -> list[int]:
    """Raises ValueError unless cu_seqlens [documents + 1] cuts a sequence of seq_len tokens, of which q [1, T, Hq, D]
    holds all or a shard; returns its values.

    Reading a tensor on a GPU waits for it.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"cu_seqlens is of type {type(cu_seqlens).__name__}: give an int32 tensor [documents + 1]")
    _require(cu_seqlens.dtype == torch.int32, f"cu_seqlens has dtype {cu_seqlens.dtype}: give torch.int32")
    _require(
        cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2,
        f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: give [documents + 1], at least 2 entries",
    )
    _require(
        cu_seqlens.device in (torch.device("cpu"), q.device),
        f"cu_seqlens is on {cu_seqlens.device}: put it on the CPU or on q's device, {q.device}",
    )
    _require(
        q.shape[0] == 1,
        f"cu_seqlens was given for q of shape {tuple(q.shape)}: packed documents need batch 1, [1, total tokens, ...]",
    )
    bounds = cu_seqlens.tolist()
    _require(bounds[0] == 0, f"cu_seqlens starts at {bounds[0]}: its first entry must be 0")
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        _require(
            start <= end,
            f"cu_seqlens falls from {start} to {end} at entry {index + 1}: give offsets that never decrease",
        )
    _require(
        bounds[-1] == seq_len,
        f"cu_seqlens ends at {bounds[-1]} but the sequence has {seq_len} tokens: its last entry must be their number",
    )
    return bounds


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

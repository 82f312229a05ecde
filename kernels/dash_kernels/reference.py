"""Reference: docs/algorithm.md in plain PyTorch, with its names, written to be read.

Knows the definition; does not know memory or speed: it builds the T x T scores. Gradients come from autograd, so the
hand-written backward passes of the backends are checked against an independent derivation. The two exceptions are
marked: the stop-gradient on the mean of log P, and the floor in the derivative of log P.

Method: DashAttention, arXiv 2605.18753. alpha-entmax: Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models",
ACL 2019.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from dash_kernels.spec import PRIOR_FLOOR, RoutingStatistics, accumulation_dtype


def reference_dash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    chunk_size: int = 64,
    alpha: float = 1.5,
    routing_scale: float = 1.0,
    prior_sigma: float | None = None,
    softmax_scale: float | None = None,
    attend_first_chunk: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RoutingStatistics]:
    """DashAttention of q [B, T, Hq, D], k and v [B, T, Hkv, D], summary_query [Hkv, D] -> [B, T, Hq, D].

    With cu_seqlens [documents + 1], document i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1, computed as a
    sequence of its own. The settings are the fields of `AttentionSpec`, with any
    chunk_size.

    Matrix products run in the inputs' dtype, reductions in float32 (float64 for float64 inputs). With float64 inputs
    this is the reference. With bfloat16 inputs it is the usual eager implementation, whose rounding tests compare to.
    """
    settings = chunk_size, alpha, routing_scale, prior_sigma, softmax_scale, attend_first_chunk
    if cu_seqlens is None:
        return _one_document(q, k, v, summary_query, *settings)
    documents = [
        _one_document(q[:, start:end], k[:, start:end], v[:, start:end], summary_query, *settings)
        for start, end in itertools.pairwise(cu_seqlens.tolist())
        if start < end
    ]
    selected = torch.cat([routing.selected_per_token for _, routing in documents], dim=1)
    available = torch.cat([routing.available_per_token for _, routing in documents])
    return torch.cat([out for out, _ in documents], dim=1), RoutingStatistics(selected, available)


def reference_window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of q [B, T, Hq, D] to the last `window` of k and v [B, T, Hkv, D] in its document -> [B, T, Hq, D].

    cu_seqlens as for `reference_dash_attention`.
    """
    tokens = torch.arange(q.shape[1], device=q.device)
    borders = torch.tensor([0]) if cu_seqlens is None else cu_seqlens[1:-1]
    document = torch.searchsorted(borders.to(tokens), tokens, right=True)
    distance = tokens[:, None] - tokens
    allowed = (distance >= 0) & (distance < window) & (document[:, None] == document)
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / math.sqrt(q.shape[3])
    weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, values)


def _one_document(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    chunk_size: int,
    alpha: float,
    routing_scale: float,
    prior_sigma: float | None,
    softmax_scale: float | None,
    attend_first_chunk: bool,
) -> tuple[torch.Tensor, RoutingStatistics]:
    batch, seq_len, query_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = query_heads // kv_heads
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    accumulate = accumulation_dtype(q.dtype)
    complete = seq_len // chunk_size
    chunk_of = torch.arange(seq_len, device=q.device) // chunk_size

    queries = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, T, D]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, T, D]

    # Stage 1: summaries of the complete chunks
    chunks = keys[:, :, : complete * chunk_size].reshape(batch, kv_heads, complete, chunk_size, head_dim)
    summary_scores = torch.einsum("bhncd,hd->bhnc", chunks, summary_query).to(accumulate) * scale
    summary_weights = torch.softmax(summary_scores, dim=-1)
    summaries = torch.einsum("bhnc,bhncd->bhnd", summary_weights.to(q.dtype), chunks)

    # Stage 2: routing over the earlier chunks
    z = torch.einsum("bhgtd,bhnd->bhgtn", queries, summaries).to(accumulate) * (routing_scale * scale)
    candidates = torch.arange(complete, device=q.device)
    earlier = candidates < chunk_of[:, None]  # [T, n]
    if attend_first_chunk:
        earlier &= candidates > 0
    p = entmax(z, earlier, alpha)  # [B, Hkv, G, T, n]
    prior = p.mean(dim=2)  # [B, Hkv, T, n]
    routed = prior > 0

    # Stage 3: softmax over the selected chunks with the prior as bias
    log_prior: torch.Tensor = _FlooredLog.apply(torch.where(routed, prior, 1.0))
    if prior_sigma is not None:
        mean = (log_prior * routed).sum(-1, keepdim=True) / routed.sum(-1, keepdim=True).clamp(min=1)
        log_prior = (log_prior - mean.detach()) / prior_sigma
    bias = torch.full((batch, kv_heads, seq_len, math.ceil(seq_len / chunk_size)), -math.inf).to(z)
    bias[..., :complete] = torch.where(routed, log_prior, -math.inf)
    if attend_first_chunk:
        bias[..., 0] = 0.0
    bias = bias.scatter(-1, chunk_of[:, None].expand(batch, kv_heads, seq_len, 1), 0.0)
    token_bias = bias[..., chunk_of]  # [B, Hkv, T, T]
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bhgtd,bhsd->bhgts", queries, keys).to(accumulate) * scale
    scores = scores + token_bias.masked_fill(~causal, -math.inf).unsqueeze(2)
    weights = torch.softmax(scores, dim=-1)
    out = torch.einsum("bhgts,bhsd->bhgtd", weights.to(q.dtype), values)
    out = out.permute(0, 3, 1, 2, 4).reshape(q.shape)

    always = 1 + (chunk_of > 0) if attend_first_chunk else 1
    selected = (routed.sum(-1) + always).transpose(1, 2).to(torch.int32)
    return out, RoutingStatistics(selected, (chunk_of + 1).to(torch.int32))


def entmax(z: torch.Tensor, allowed: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha-entmax over the allowed entries of the last dim; rows with none allowed are all zero.

    Exact by sorting for alpha 1.5 and 2, by bisection to the dtype's precision for any other alpha in (1, 2].
    """
    if z.shape[-1] == 0:
        return z
    some = allowed.any(-1, keepdim=True)
    x = (alpha - 1) * torch.where(allowed, z, -math.inf)
    x = torch.where(some, x, 0.0)  # rows without an allowed entry: any finite value, masked at the end
    x = x - x.detach().amax(-1, keepdim=True)  # p is unchanged by a shift of x
    exponent = 1 / (alpha - 1)
    tau = _threshold_by_sorting(x, alpha) if alpha in (1.5, 2.0) else _threshold_by_bisection(x, exponent)
    return torch.where(allowed, (x - tau).clamp(min=0).pow(exponent), 0.0)


def _threshold_by_sorting(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """tau [..., 1] by the closed form on every prefix of the sorted row; the longest valid prefix is the support."""
    descending = x.sort(dim=-1, descending=True).values
    finite = descending.isfinite()
    values = torch.where(finite, descending, 0.0)
    size = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    total = values.cumsum(-1)
    if alpha == 2.0:
        candidates = (total - 1) / size
    else:
        mean = total / size
        spread = values.square().cumsum(-1) - size * mean.square()
        room = (1 - spread) / size
        # A prefix too spread out to sum to one is no support; sqrt(0) would poison its (unused) gradient with NaN.
        candidates = mean - torch.where(room > 0, room, 1.0).sqrt()
        finite = finite & (room > 0)
    support = (finite & (candidates < descending)).sum(-1, keepdim=True).clamp(min=1)
    return candidates.gather(-1, support - 1)


def _threshold_by_bisection(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """tau [..., 1] for rows with maximum 0: bisection, then one Newton step that autograd differentiates.

    At the root, the derivative of the Newton step is the implicit derivative of the root.
    """
    with torch.no_grad():
        low, high = torch.full_like(x[..., :1], -1.0), torch.zeros_like(x[..., :1])
        for _ in range(80):
            middle = (low + high) / 2
            too_low = (x - middle).clamp(min=0).pow(exponent).sum(-1, keepdim=True) >= 1
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        slope = -exponent * (x - low).clamp(min=0).pow(exponent - 1).sum(-1, keepdim=True)
    excess = (x - low).clamp(min=0).pow(exponent).sum(-1, keepdim=True) - 1
    return low - excess / slope


class _FlooredLog(torch.autograd.Function):
    """log whose derivative is 1 / max(x, PRIOR_FLOOR); see PRIOR_FLOOR."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad / x.clamp(min=PRIOR_FLOOR)

"""Reference of the rules in `selection`: attention to lists of chunks in plain PyTorch, token by token.

Knows the definitions; does not know memory or speed. Gradients come from autograd. It shares no code with
`listed_routing`.
"""

from __future__ import annotations

import itertools
import math

import torch

from dash_kernels.selection import InfLLMv2, SelectionRule
from dash_kernels.spec import RoutingStatistics


def reference_selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    selection: SelectionRule,
    chunk_size: int = 64,
    routing_scale: float = 1.0,
    softmax_scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RoutingStatistics]:
    """Attention of q [B, T, Hq, D] to the selected chunks of k and v [B, T, Hkv, D] -> [B, T, Hq, D].

    summary_query [Hkv, D] has a gradient of zeros. The other arguments are those of `reference_dash_attention`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, counts, available = [], [], []
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        queries, keys, values = (x[:, start:end] for x in (q, k, v))
        with torch.no_grad():
            chosen = _chosen(queries, keys, summary_query, selection, chunk_size, routing_scale, scale)
        outputs.append(_attend(queries, keys, values, chosen, chunk_size, scale))
        counts.append(chosen.sum(-1, dtype=torch.int32))
        available.append((torch.arange(end - start, dtype=torch.int32) // chunk_size + 1).to(q.device))
    out = torch.cat(outputs, dim=1) + 0 * summary_query.sum()
    return out, RoutingStatistics(torch.cat(counts, dim=1), torch.cat(available))


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, chunk_size: int, scale: float
) -> torch.Tensor:
    """Softmax over the tokens of the chosen chunks, bool [B, T, Hkv, chunks]."""
    tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    chunk_of = torch.arange(tokens, device=q.device) // chunk_size
    seen = chosen[..., chunk_of] & torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril().unsqueeze(1)
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bths", q, keys) * scale
    scores = scores.masked_fill(~seen.repeat_interleave(group, dim=2), -math.inf)
    return torch.einsum("bths,bshd->bthd", torch.softmax(scores, dim=-1), values)


def _chosen(
    q: torch.Tensor,
    k: torch.Tensor,
    summary_query: torch.Tensor,
    selection: SelectionRule,
    chunk_size: int,
    routing_scale: float,
    scale: float,
) -> torch.Tensor:
    """Chunks that every token of one document selected, bool [B, T, Hkv, chunks]."""
    batch, tokens, query_heads, _ = q.shape
    kv_heads = k.shape[2]
    group = query_heads // kv_heads
    chosen = torch.zeros(batch, tokens, kv_heads, -(-tokens // chunk_size), dtype=torch.bool, device=q.device)
    for b, t, h in itertools.product(range(batch), range(tokens), range(kv_heads)):
        heads = q[b, t, h * group : (h + 1) * group]  # [G, D]
        own = t // chunk_size
        if isinstance(selection, InfLLMv2):
            scores = _kernel_scores(heads, k[b, :, h], t, tokens, chunk_size, scale, selection)
        else:
            earlier = k[b, : own * chunk_size, h]
            scores = _summary_scores(heads, earlier, summary_query[h], chunk_size, routing_scale, scale)
        best = sorted(range(own), key=lambda j: (-scores[j], j))[: selection.count - 1]
        if isinstance(selection, InfLLMv2) and tokens <= selection.dense_length:
            best = list(range(own))
        chosen[b, t, h, [*best, own]] = True
    return chosen


def _summary_scores(
    heads: torch.Tensor, k: torch.Tensor, query: torch.Tensor, chunk_size: int, routing_scale: float, scale: float
) -> list[float]:
    """Mean probability of each earlier chunk by the summaries of their keys [earlier tokens, D]."""
    chunks = k.unflatten(0, (-1, chunk_size))  # [j, C, D]
    weights = torch.softmax(chunks @ query * scale, dim=-1)
    summaries = torch.einsum("jc,jcd->jd", weights, chunks)
    found: list[float] = torch.softmax(heads @ summaries.T * (routing_scale * scale), dim=-1).mean(0).tolist()
    return found


def _kernel_scores(
    heads: torch.Tensor, k: torch.Tensor, token: int, tokens: int, chunk_size: int, scale: float, rule: InfLLMv2
) -> list[float]:
    """Worth of each chunk before a token's own by the kernels over the keys [T, D] that end at or before the token."""
    own = token // chunk_size
    starts = [start for start in range(0, tokens, 16) if start + 32 <= token + 1]
    probability = torch.zeros(len(starts), dtype=k.dtype)
    if starts:
        kernels = torch.stack([k[start : start + 32].mean(0) for start in starts])
        probability = torch.softmax(heads @ kernels.T * scale, dim=-1).sum(0)
    worth = []
    for chunk in range(own):
        begin, end = chunk * chunk_size, (chunk + 1) * chunk_size
        of_chunk = [
            float(p) for start, p in zip(starts, probability, strict=True) if start + 32 > begin and start < end
        ]
        always = chunk < rule.first_chunks or own - chunk <= rule.local_chunks
        worth.append(math.inf if always else max(of_chunk, default=0.0))
    return worth

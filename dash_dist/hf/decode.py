"""DashAttention of one new token per row against cached keys, values and summaries, in plain PyTorch.

Knows the formulas of docs/algorithm.md for a single query; does not know caches or transformers. Vectorised over rows
and heads. The cost is that of all summaries and of the selected chunks. A kernel for GPUs belongs here: `decode` is the
one place that calls for it, with these arguments.
"""

from __future__ import annotations

import math

import torch

from dash_kernels import AttentionSpec
from dash_kernels.entmax import entmax_threshold
from dash_kernels.spec import accumulation_dtype


def decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    summaries: torch.Tensor | None,
    starts: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of the last token of every row to itself and the tokens before it.

    Args:
        q: [B, Hq, D].
        keys, values: [B, Hkv, S, D], the new token's last.
        summaries: [B, n, Hkv, D] of the whole chunks of each row, rubbish beyond a row's own; None if there are none.
        starts: int64 [B], each row's first token; None for 0 everywhere.
        spec: with softmax_scale as a number.

    Returns [B, Hq, D] in q's dtype.
    """
    batch, kv_heads, length, _ = keys.shape
    size, device = spec.chunk_size, q.device
    accumulate = accumulation_dtype(values.dtype)
    queries = q.unflatten(1, (kv_heads, -1)).to(accumulate)  # [B, Hkv, G, D]
    last = length - 1
    if starts is None:
        starts = torch.zeros(batch, dtype=torch.int64, device=device)
        chunks = last // size
    else:
        starts = starts.clamp(max=last)  # a row that is all padding attends to its padding
        chunks = 0 if summaries is None else summaries.shape[1]
    own = (last - starts) // size  # [B]
    if summaries is None or chunks == 0:
        ids, bias = own[:, None, None].expand(-1, kv_heads, -1), queries.new_zeros(batch, kv_heads, 1)
    else:
        ids, bias = _select(queries, summaries[:, :chunks], own, spec)
    tokens = starts[:, None, None, None] + ids.unsqueeze(-1) * size + torch.arange(size, device=device)
    bias = torch.where(tokens <= last, bias.unsqueeze(-1), -math.inf).flatten(2)  # [B, Hkv, selected tokens]
    places = tokens.clamp(max=last).flatten(2).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
    selected_keys, selected_values = (x.gather(2, places).to(accumulate) for x in (keys, values))
    scores = torch.einsum("bhgd,bhsd->bhgs", queries * spec.scale, selected_keys) + bias.unsqueeze(2)
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("bhgs,bhsd->bhgd", weights, selected_values).flatten(1, 2).to(values.dtype)


def _select(
    queries: torch.Tensor, summaries: torch.Tensor, own: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 2 and the bias: ids and bias [B, Hkv, m] of the chunks that each row's KV head selected, the own one last.

    queries [B, Hkv, G, D], summaries [B, n, Hkv, D] with n >= 1, own [B]. m is the largest number of selected chunks;
    the bias is -inf where a head selected fewer.
    """
    x = torch.einsum("bhgd,bjhd->bhgj", queries, summaries) * ((spec.alpha - 1) * spec.routing_logit_scale)
    candidates = torch.arange(summaries.shape[1], device=own.device)
    earlier = (candidates < own[:, None])[:, None, None]  # [B, 1, 1, n]
    if spec.attend_first_chunk:
        earlier = earlier & (candidates > 0)
    # The threshold is at least the row's maximum - 1, so what lies 2 below has no probability.
    floor = torch.where(earlier, x, -math.inf).amax(-1, keepdim=True) - 2
    x = torch.where(earlier, x, torch.where(floor.isfinite(), floor, 0.0))
    tau = entmax_threshold(x, spec.alpha).unsqueeze(-1)
    p = torch.where(earlier, (x - tau).clamp(min=0).pow(1 / (spec.alpha - 1)), 0.0)
    prior = p.mean(2)  # [B, Hkv, n]
    count = (prior > 0).sum(-1, keepdim=True)
    chosen, ids = prior.topk(int(count.max()), dim=-1)
    routed = chosen > 0
    log_prior = torch.where(routed, chosen, 1.0).log()
    if spec.prior_sigma is not None:
        log_prior = (log_prior - log_prior.sum(-1, keepdim=True) / count.clamp(min=1)) * spec.prior_exponent
    bias = torch.where(routed, log_prior, -math.inf)
    own = own[:, None, None].expand(-1, queries.shape[1], -1)
    if spec.attend_first_chunk:
        # A row in its first chunk has it as its own.
        ids = torch.cat((ids, torch.zeros_like(own)), dim=-1)
        bias = torch.cat((bias, torch.where(own > 0, 0.0, -math.inf).to(bias)), dim=-1)
    return torch.cat((ids, own), dim=-1), torch.nn.functional.pad(bias, (0, 1))

"""The stages in vectorised PyTorch, one chunk of queries at a time: memory linear in T on any device and float dtype.

A loop step holds the scores of one chunk of queries against the chunks that any of them selected. So work follows the
density, and no buffer grows with T x T. Backward passes are written by hand from docs/algorithm.md, whose names they
use. Everything runs in float32, or float64 for float64 inputs. Knows parts of a sequence; does not know ranks.
"""

from __future__ import annotations

import math

import torch

from dash_kernels.chunks import ChunkGrid
from dash_kernels.eager_selection import (
    DensePart,
    biased_scores,
    chunked,
    chunks_with_gradient,
    gather_keys,
    probabilities,
    probability_gradient,
    query_chunks,
    routing_scores,
    scatter_add,
    score_gradient,
    select,
    slopes,
    to_tokens,
    token_index,
    unchunked,
)
from dash_kernels.entmax import entmax_threshold
from dash_kernels.listed_routing import listed_routing
from dash_kernels.query_blocks import QueryBlock
from dash_kernels.selection import InfLLMv2
from dash_kernels.selection_scores import stride_means
from dash_kernels.spec import (
    AttentionSpec,
    Blocks,
    OutputGradient,
    Part,
    Queries,
    QueryGradient,
    Routing,
    accumulation_dtype,
)


def summarize(k: torch.Tensor, chunks: ChunkGrid, summary_query: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Stage 1: k [B, S, Hkv, D] -> a summary per chunk [B, slots, Hkv, D] in the accumulation dtype.

    Incomplete chunks have zeros: no query is ever routed to them. InfLLMv2 has its own, `stride_means`.
    """
    if isinstance(spec.selection, InfLLMv2):
        return stride_means(k, chunks, spec)
    complete, keys, weights = _summary_weights(k, chunks, summary_query, spec)
    summaries = keys.new_zeros(k.shape[0], len(chunks), *k.shape[2:])
    summaries[:, complete] = torch.einsum("bnch,bnchd->bnhd", weights, keys)
    return summaries


def _summary_weights(
    k: torch.Tensor, chunks: ChunkGrid, summary_query: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots of the n complete chunks [n], their keys [B, n, C, Hkv, D], and the keys' weights w [B, n, C, Hkv]."""
    complete = (chunks.on(k.device)[2] == spec.chunk_size).nonzero().flatten()
    keys = k[:, token_index(chunks, spec, k.device)[complete]].to(accumulation_dtype(k.dtype))
    weights = torch.softmax(torch.einsum("bnchd,hd->bnch", keys, summary_query.to(keys)) * spec.scale, dim=2)
    return complete, keys, weights


def route(q: torch.Tensor, chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec) -> Routing:
    """Stage 2: thresholds of q [B, T, Hq, D] against the summaries [B, n, Hkv, D] of the whole sequence, by chunk id.

    A query is routed to the earlier chunks of its own document.
    """
    batch, seq_len, query_heads, _ = q.shape
    kv_heads = summaries.shape[2]
    if spec.selection is not None:
        marks = torch.zeros(batch, kv_heads, summaries.shape[1], dtype=torch.bool, device=q.device)
        return listed_routing(q, chunks, summaries, spec, marks, _mark)
    tau = summaries.new_zeros(batch, seq_len, query_heads)
    log_mean = summaries.new_zeros(batch, seq_len, kv_heads)
    selected = torch.ones(batch, seq_len, kv_heads, dtype=torch.int32, device=q.device)
    masks = torch.zeros(batch, kv_heads, summaries.shape[1], dtype=torch.bool, device=q.device)
    for chunk in query_chunks(q, chunks, kv_heads):
        if chunk.id == chunk.first:
            continue
        x = routing_scores(chunk.q, summaries[:, chunk.earlier], spec)
        threshold = entmax_threshold(x, spec.alpha)
        prior = probabilities(x, threshold, spec).mean(2)  # [B, Hkv, C, j]
        routed = prior > 0
        count = routed.sum(-1)
        masks[:, :, chunk.earlier] |= routed.any(2)
        tau[:, chunk.tokens] = to_tokens(threshold)
        selected[:, chunk.tokens] = (count + 1).to(torch.int32).transpose(1, 2)
        if spec.prior_sigma is not None:
            mean = torch.where(routed, prior, 1.0).log().sum(-1) / count.clamp(min=1)
            log_mean[:, chunk.tokens] = mean.transpose(1, 2)
    return Routing(tau, log_mean, selected, masks)


def _mark(masks: torch.Tensor, block: QueryBlock, hits: torch.Tensor) -> None:
    masks[..., : block.end] |= hits.any(2)


def mark_one(
    q: torch.Tensor, chunks: ChunkGrid, chosen: torch.Tensor, summaries: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """`Routing.masks` where the queries of a slot select one earlier chunk, `chosen`, int32 [slots]; n for none."""
    batch, n, kv_heads, _ = summaries.shape
    masks = torch.zeros(batch, kv_heads, n, dtype=torch.bool, device=q.device)
    masks[..., chosen[chosen < n].long()] = True
    return masks


def reached(routing: Routing, chunks: ChunkGrid, n: int, spec: AttentionSpec) -> torch.Tensor:
    """Earlier chunks that any of the routed queries selected, bool [B, Hkv, n]."""
    return routing.masks


def attend(
    queries: Queries,
    part: Part | Blocks,
    spec: AttentionSpec,
    *,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 3 over a part of the sequence, merged with the result over the parts before it.

    Returns the output [B, T, Hq, D], normalised over the parts so far, and its log-sum-exp [B, T, Hq] (-inf where a
    query has seen nothing it selected), in the accumulation dtype. The output of the last part is in q's dtype. May
    overwrite `before`, the result of the earlier parts.
    """
    q, summaries, routing = queries.q, queries.summaries, queries.routing
    dtype = summaries.dtype
    part = DensePart.of(part, summaries.shape, spec).part
    keys, values = (chunked(x, part.chunks, spec).to(dtype) for x in (part.k, part.v))
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for chunk in query_chunks(q, queries.chunks, part.k.shape[2]):
        selection = select(chunk, part.chunks, summaries, routing, spec)
        if selection is None:
            continue
        scores = biased_scores(chunk, selection, keys, spec)
        chunk_lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - _finite(chunk_lse).unsqueeze(-1))
        out[:, chunk.tokens] = to_tokens(torch.einsum("bhgts,bhsd->bhgtd", weights, gather_keys(values, selection)))
        lse[:, chunk.tokens] = to_tokens(chunk_lse)
    if before is not None:
        total = torch.logaddexp(before[1], lse)
        shares = (torch.exp(x - _finite(total)).unsqueeze(-1) for x in (before[1], lse))
        out, lse = before[0] * next(shares) + out * next(shares), total
    return out.to(q.dtype) if last else out, lse


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Replaces -inf by 0, so that a difference to it is not NaN."""
    return torch.where(lse == -math.inf, 0.0, lse)


def row_dots(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """delta [B, T, Hq] = sum over D of grad * out, both [B, T, Hq, D]; in the accumulation dtype."""
    dtype = accumulation_dtype(grad.dtype)
    return (grad.to(dtype) * out.to(dtype)).sum(-1)


def query_gradient(
    queries: Queries, upstream: OutputGradient, part: Part | Blocks, spec: AttentionSpec, before: QueryGradient | None
) -> QueryGradient:
    """Adds a part of K and V to `before`, the gradient of the queries over earlier parts, which may be overwritten.

    With u = p^(2 - alpha) and ratio = sum(u dp) / sum(u), entmax's gradient is dz = u (dp - ratio). The sums run over
    the whole row, so dq has only the first term here; `finish_query_gradient` adds the second.
    """
    q, summaries = queries.q, queries.summaries
    part = DensePart.of(part, summaries.shape, spec).part
    keys, values = (chunked(x, part.chunks, spec).to(summaries.dtype) for x in (part.k, part.v))
    if before is None:
        dq = torch.zeros(q.shape, dtype=summaries.dtype, device=q.device)
        before = QueryGradient(dq, dq.new_zeros(q.shape[:3]), dq.new_zeros(q.shape[:3]))
    for chunk, grad in chunks_with_gradient(queries, upstream):
        selection = select(chunk, part.chunks, summaries, queries.routing, spec)
        if selection is None:
            continue
        _, dscores = score_gradient(chunk, grad, selection, keys, values, upstream, spec)
        dq = torch.einsum("bhgts,bhsd->bhgtd", dscores, gather_keys(keys, selection)) * spec.scale
        if selection.ids and selection.slopes is not None:
            udp = selection.slopes * probability_gradient(dscores, selection, spec).unsqueeze(2)  # [B, Hkv, G, C, j]
            before.weighted_sum[:, chunk.tokens] += to_tokens(udp.sum(-1))
            before.slope_sum[:, chunk.tokens] += to_tokens(selection.slopes.sum(-1))
            dq += torch.einsum("bhgtj,bjhd->bhgtd", udp * spec.routing_logit_scale, summaries[:, selection.ids])
        before.dq[:, chunk.tokens] += to_tokens(dq)
    return before


def finish_query_gradient(
    queries: Queries, upstream: OutputGradient, part: Part | Blocks, spec: AttentionSpec, before: QueryGradient | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query_gradient` of the last part, with the term of the row sums.

    Returns the gradient of q in its dtype, and ratio = sum(u dp) / sum(u) of every row, [B, T, Hq] in the accumulation
    dtype.
    """
    sums = query_gradient(queries, upstream, part, spec, before)
    if queries.routing.lists is not None:
        return sums.dq.to(queries.q.dtype), sums.weighted_sum
    # The sum is 0 only without an earlier chunk, or where scores overflow the precision of their dtype.
    ratio = sums.weighted_sum / torch.where(sums.slope_sum > 0, sums.slope_sum, 1.0)
    for chunk in query_chunks(queries.q, queries.chunks, queries.summaries.shape[2]):
        if chunk.id == chunk.first:
            continue
        past = queries.summaries[:, chunk.earlier]
        p = probabilities(routing_scores(chunk.q, past, spec), chunk.rows(queries.routing.tau), spec)
        dz = -chunk.rows(ratio).unsqueeze(-1) * slopes(p, spec) * spec.routing_logit_scale
        sums.dq[:, chunk.tokens] += to_tokens(torch.einsum("bhgtj,bjhd->bhgtd", dz, past))
    return sums.dq.to(queries.q.dtype), ratio


def key_gradient(
    queries: Queries,
    upstream: OutputGradient,
    ratio: torch.Tensor,
    part: Part | Blocks,
    summary_query: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients over these queries: of a part's k and v, and of summary_query [Hkv, D], in the accumulation dtype.

    The first is [2, B, S, Hkv, D] for a `Part`, [blocks, 2, C, D] for `Blocks`. A rank that selected a chunk has its
    keys, so the gradient of the chunk's summary passes through stage 1 here. ratio [B, T, Hq] comes from
    `finish_query_gradient`.
    """
    summaries = queries.summaries
    dense = DensePart.of(part, summaries.shape, spec)
    part = dense.part
    keys, values = (chunked(x, part.chunks, spec).to(summaries.dtype) for x in (part.k, part.v))
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dsummaries = summaries.new_zeros(summaries.shape[0], len(part.chunks), *summaries.shape[2:])
    for chunk, grad in chunks_with_gradient(queries, upstream):
        selection = select(chunk, part.chunks, summaries, queries.routing, spec)
        if selection is None:
            continue
        weights, dscores = score_gradient(chunk, grad, selection, keys, values, upstream, spec)
        scatter_add(dvalues, selection, torch.einsum("bhgts,bhgtd->bhsd", weights, grad))
        scatter_add(dkeys, selection, torch.einsum("bhgts,bhgtd->bhsd", dscores, chunk.q) * spec.scale)
        if selection.ids and selection.slopes is not None:
            dp = probability_gradient(dscores, selection, spec).unsqueeze(2)
            dz = selection.slopes * (dp - chunk.rows(ratio).unsqueeze(-1)) * spec.routing_logit_scale
            dsummaries[:, selection.slots[: len(selection.ids)]] += torch.einsum("bhgtj,bhgtd->bjhd", dz, chunk.q)
    dkv = torch.stack([unchunked(x, part.chunks) for x in (dkeys, dvalues)])
    if queries.routing.lists is not None:
        return dense.to_blocks(dkv, spec), torch.zeros_like(summary_query, dtype=summaries.dtype)
    dsummary_query = _summarize_backward(dsummaries, part, summary_query, spec, dkv[0])
    return dense.to_blocks(dkv, spec), dsummary_query


def _summarize_backward(
    grad: torch.Tensor, part: Part, summary_query: torch.Tensor, spec: AttentionSpec, dk: torch.Tensor
) -> torch.Tensor:
    """Adds to dk [B, S, Hkv, D] from the gradient of a part's summaries [B, slots, Hkv, D].

    Returns the gradient of summary_query [Hkv, D].
    """
    complete, keys, weights = _summary_weights(part.k, part.chunks, summary_query, spec)
    grad = grad[:, complete]
    dweights = torch.einsum("bnhd,bnchd->bnch", grad, keys)
    dlogits = weights * (dweights - (weights * dweights).sum(2, keepdim=True)) * spec.scale
    dkeys = weights.unsqueeze(-1) * grad.unsqueeze(2) + dlogits.unsqueeze(-1) * summary_query.to(grad)
    dk[:, token_index(part.chunks, spec, dk.device)[complete]] += dkeys
    return torch.einsum("bnch,bnchd->hd", dlogits, keys)

"""The stages in vectorised PyTorch, one chunk of queries at a time: memory linear in T on any device and float dtype.

A loop step holds the scores of one chunk of queries against the chunks that any of them selected, so work follows the
density and no buffer grows with T x T. Every backward pass is the hand-written one of the definition. Runs in float32
(float64 for float64 inputs) whatever the inputs' dtype. Knows nothing of ranks: K and V may be any part of a sequence.
"""

from __future__ import annotations

import math

import torch

from dash_kernels.chunks import ChunkGrid
from dash_kernels.eager_walk import (
    Rectangle,
    biased_scores,
    blocks_with_gradient,
    chunked,
    gather_keys,
    prior_gradient,
    probabilities,
    query_blocks,
    routing_scores,
    scatter_add,
    score_gradient,
    slopes,
    to_tokens,
    token_index,
    unchunked,
    walk_of,
)
from dash_kernels.entmax import entmax_threshold
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

    Incomplete chunks have zeros: nobody is ever routed to them.
    """
    complete, keys, weights = _summary_weights(k, chunks, summary_query, spec)
    summaries = keys.new_zeros(k.shape[0], len(chunks), *k.shape[2:])
    summaries[:, complete] = torch.einsum("bnch,bnchd->bnhd", weights, keys)
    return summaries


def _summary_weights(
    k: torch.Tensor, chunks: ChunkGrid, summary_query: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slots of the n complete chunks [n], their keys [B, n, C, Hkv, D], and the keys' weights [B, n, C, Hkv]."""
    complete = (chunks.on(k.device)[2] == spec.chunk_size).nonzero().flatten()
    keys = k[:, token_index(chunks, spec, k.device)[complete]].to(accumulation_dtype(k.dtype))
    weights = torch.softmax(torch.einsum("bnchd,hd->bnch", keys, summary_query.to(keys)) * spec.scale, dim=2)
    return complete, keys, weights


def route(q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec) -> Routing:
    """Stage 2: thresholds of q [B, T, Hq, D] against the summaries [B, n, Hkv, D] of the whole sequence, by chunk id.

    A query is routed to the earlier chunks of its own document.
    """
    batch, seq_len, query_heads, _ = q.shape
    kv_heads = summaries.shape[2]
    tau = summaries.new_zeros(batch, seq_len, query_heads)
    log_mean = summaries.new_zeros(batch, seq_len, kv_heads)
    selected = torch.ones(batch, seq_len, kv_heads, dtype=torch.int32, device=q.device)
    masks = torch.zeros(batch, kv_heads, summaries.shape[1], dtype=torch.bool, device=q.device)
    for block in query_blocks(q, query_chunks, kv_heads):
        if block.chunk == block.first:
            continue
        x = routing_scores(block.q, summaries[:, block.earlier], spec)
        threshold = entmax_threshold(x, spec.alpha)
        prior = probabilities(x, threshold, spec).mean(2)  # [B, Hkv, C, j]
        routed = prior > 0
        count = routed.sum(-1)
        masks[:, :, block.earlier] |= routed.any(2)
        tau[:, block.tokens] = to_tokens(threshold)
        selected[:, block.tokens] = (count + 1).to(torch.int32).transpose(1, 2)
        if spec.prior_sigma is not None:
            mean = torch.where(routed, prior, 1.0).log().sum(-1) / count.clamp(min=1)
            log_mean[:, block.tokens] = mean.transpose(1, 2)
    return Routing(tau, log_mean, selected, masks)


def reached(routing: Routing, query_chunks: ChunkGrid, n: int, spec: AttentionSpec) -> torch.Tensor:
    """The earlier chunks that any of the routed queries selected: bool [B, Hkv, n]."""
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
    query has met nothing it selected), in the accumulation dtype; the output of the last part is in q's dtype. May
    overwrite `before`, the result of the parts before.
    """
    q, summaries, routing = queries.q, queries.summaries, queries.routing
    dtype = summaries.dtype
    part = Rectangle.of(part, summaries.shape, spec).part
    keys, values = (chunked(x, part.chunks, spec).to(dtype) for x in (part.k, part.v))
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for block in query_blocks(q, queries.chunks, part.k.shape[2]):
        walk = walk_of(block, part.chunks, summaries, routing, spec)
        if walk is None:
            continue
        scores = biased_scores(block, walk, keys, spec)
        block_lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - _finite(block_lse).unsqueeze(-1))
        out[:, block.tokens] = to_tokens(torch.einsum("bhgts,bhsd->bhgtd", weights, gather_keys(values, walk)))
        lse[:, block.tokens] = to_tokens(block_lse)
    if before is not None:
        total = torch.logaddexp(before[1], lse)
        shares = (torch.exp(x - _finite(total)).unsqueeze(-1) for x in (before[1], lse))
        out, lse = before[0] * next(shares) + out * next(shares), total
    return out.to(q.dtype) if last else out, lse


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """0 in place of -inf, so that a difference to it is not NaN."""
    return torch.where(lse == -math.inf, 0.0, lse)


def row_dots(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """delta [B, T, Hq] = sum over D of grad * out, both [B, T, Hq, D]; in the accumulation dtype."""
    dtype = accumulation_dtype(grad.dtype)
    return (grad.to(dtype) * out.to(dtype)).sum(-1)


def query_gradient(
    queries: Queries, upstream: OutputGradient, part: Part | Blocks, spec: AttentionSpec, before: QueryGradient | None
) -> QueryGradient:
    """What a part of K and V adds to the gradient of the queries; `before` is that of the parts before it, and may be
    overwritten.

    With u = p^(2 - alpha), entmax's gradient is dz = u (dp - sum(u dp) / sum(u)). The sums run over the whole row, so
    only the first term is in dq; `finish_query_gradient` adds the second.
    """
    q, summaries = queries.q, queries.summaries
    part = Rectangle.of(part, summaries.shape, spec).part
    keys, values = (chunked(x, part.chunks, spec).to(summaries.dtype) for x in (part.k, part.v))
    if before is None:
        dq = torch.zeros(q.shape, dtype=summaries.dtype, device=q.device)
        before = QueryGradient(dq, dq.new_zeros(q.shape[:3]), dq.new_zeros(q.shape[:3]))
    for block, grad in blocks_with_gradient(queries, upstream):
        walk = walk_of(block, part.chunks, summaries, queries.routing, spec)
        if walk is None:
            continue
        _, dscores = score_gradient(block, grad, walk, keys, values, upstream, spec)
        dq = torch.einsum("bhgts,bhsd->bhgtd", dscores, gather_keys(keys, walk)) * spec.scale
        if walk.ids:
            udp = walk.slopes * prior_gradient(dscores, walk, spec).unsqueeze(2)  # [B, Hkv, G, C, j]
            before.weighted_sum[:, block.tokens] += to_tokens(udp.sum(-1))
            before.slope_sum[:, block.tokens] += to_tokens(walk.slopes.sum(-1))
            dq += torch.einsum("bhgtj,bjhd->bhgtd", udp * spec.routing_logit_scale, summaries[:, walk.ids])
        before.dq[:, block.tokens] += to_tokens(dq)
    return before


def finish_query_gradient(
    queries: Queries, upstream: OutputGradient, part: Part | Blocks, spec: AttentionSpec, before: QueryGradient | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query_gradient` of the last part, with the term of the row sums.

    Returns the gradient of q in its dtype, and of every row sum(u dp) / sum(u), [B, T, Hq] in the accumulation dtype.
    """
    sums = query_gradient(queries, upstream, part, spec, before)
    # The sum is 0 only without an earlier chunk, or where the scores exceed what their dtype can tell apart.
    ratio = sums.weighted_sum / torch.where(sums.slope_sum > 0, sums.slope_sum, 1.0)
    for block in query_blocks(queries.q, queries.chunks, queries.summaries.shape[2]):
        if block.chunk == block.first:
            continue
        past = queries.summaries[:, block.earlier]
        p = probabilities(routing_scores(block.q, past, spec), block.rows(queries.routing.tau), spec)
        dz = -block.rows(ratio).unsqueeze(-1) * slopes(p, spec) * spec.routing_logit_scale
        sums.dq[:, block.tokens] += to_tokens(torch.einsum("bhgtj,bjhd->bhgtd", dz, past))
    return sums.dq.to(queries.q.dtype), ratio


def key_gradient(
    queries: Queries,
    upstream: OutputGradient,
    ratio: torch.Tensor,
    part: Part | Blocks,
    summary_query: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What these queries add to the gradients of a part's k and v, [2, B, S, Hkv, D] or [blocks, 2, C, D] as the part
    is, and to that of summary_query [Hkv, D]; both in the accumulation dtype.

    Whoever selected a chunk has its keys, so the gradient of its summary goes through stage 1 here. ratio [B, T, Hq] is
    that of `finish_query_gradient`.
    """
    summaries = queries.summaries
    rectangle = Rectangle.of(part, summaries.shape, spec)
    part = rectangle.part
    keys, values = (chunked(x, part.chunks, spec).to(summaries.dtype) for x in (part.k, part.v))
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dsummaries = summaries.new_zeros(summaries.shape[0], len(part.chunks), *summaries.shape[2:])
    for block, grad in blocks_with_gradient(queries, upstream):
        walk = walk_of(block, part.chunks, summaries, queries.routing, spec)
        if walk is None:
            continue
        weights, dscores = score_gradient(block, grad, walk, keys, values, upstream, spec)
        scatter_add(dvalues, walk, torch.einsum("bhgts,bhgtd->bhsd", weights, grad))
        scatter_add(dkeys, walk, torch.einsum("bhgts,bhgtd->bhsd", dscores, block.q) * spec.scale)
        if walk.ids:
            dp = prior_gradient(dscores, walk, spec).unsqueeze(2)
            dz = walk.slopes * (dp - block.rows(ratio).unsqueeze(-1)) * spec.routing_logit_scale
            dsummaries[:, walk.slots[: len(walk.ids)]] += torch.einsum("bhgtj,bhgtd->bjhd", dz, block.q)
    dkv = torch.stack([unchunked(x, part.chunks) for x in (dkeys, dvalues)])
    dsummary_query = _summarize_backward(dsummaries, part, summary_query, spec, dkv[0])
    return rectangle.like_the_part(dkv, spec), dsummary_query


def _summarize_backward(
    grad: torch.Tensor, part: Part, summary_query: torch.Tensor, spec: AttentionSpec, dk: torch.Tensor
) -> torch.Tensor:
    """From the gradient of a part's summaries [B, slots, Hkv, D]: adds that of k to dk [B, S, Hkv, D]; returns that of
    summary_query [Hkv, D].
    """
    complete, keys, weights = _summary_weights(part.k, part.chunks, summary_query, spec)
    grad = grad[:, complete]
    along = torch.einsum("bnhd,bnchd->bnch", grad, keys)
    dlogits = weights * (along - (weights * along).sum(2, keepdim=True)) * spec.scale
    dkeys = weights.unsqueeze(-1) * grad.unsqueeze(2) + dlogits.unsqueeze(-1) * summary_query.to(grad)
    dk[:, token_index(part.chunks, spec, dk.device)[complete]] += dkeys
    return torch.einsum("bnch,bnchd->hd", dlogits, keys)

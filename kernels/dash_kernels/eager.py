"""The stages in vectorised PyTorch, one chunk of queries at a time: memory linear in T on any device and float dtype.

A loop step holds the scores of one chunk of queries against the chunks that any of them selected, so work follows the
density and no buffer grows with T x T. Every backward pass is the hand-written one of the definition. Runs in float32
(float64 for float64 inputs) whatever the inputs' dtype. Knows nothing of ranks: K and V may be any part of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dash_kernels.chunks import ChunkGrid
from dash_kernels.entmax import entmax_threshold
from dash_kernels.spec import (
    PRIOR_FLOOR,
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
    keys = k[:, _token_index(chunks, spec, k.device)[complete]].to(accumulation_dtype(k.dtype))
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
    for block in _query_blocks(q, query_chunks, kv_heads):
        if block.chunk == block.first:
            continue
        x = _routing_scores(block.q, summaries[:, block.earlier], spec)
        threshold = entmax_threshold(x, spec.alpha)
        prior = _probabilities(x, threshold, spec).mean(2)  # [B, Hkv, C, j]
        routed = prior > 0
        count = routed.sum(-1)
        masks[:, :, block.earlier] |= routed.any(2)
        tau[:, block.tokens] = _to_tokens(threshold)
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
    part = _Rectangle.of(part, summaries.shape, spec).part
    keys, values = (_chunked(x, part.chunks, spec).to(dtype) for x in (part.k, part.v))
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for block in _query_blocks(q, queries.chunks, part.k.shape[2]):
        walk = _walk(block, part.chunks, summaries, routing, spec)
        if walk is None:
            continue
        scores = _biased_scores(block, walk, keys, spec)
        block_lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - _finite(block_lse).unsqueeze(-1))
        out[:, block.tokens] = _to_tokens(torch.einsum("bhgts,bhsd->bhgtd", weights, _gather(values, walk)))
        lse[:, block.tokens] = _to_tokens(block_lse)
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
    part = _Rectangle.of(part, summaries.shape, spec).part
    keys, values = (_chunked(x, part.chunks, spec).to(summaries.dtype) for x in (part.k, part.v))
    if before is None:
        dq = torch.zeros(q.shape, dtype=summaries.dtype, device=q.device)
        before = QueryGradient(dq, dq.new_zeros(q.shape[:3]), dq.new_zeros(q.shape[:3]))
    for block, grad in _blocks_with_gradient(queries, upstream):
        walk = _walk(block, part.chunks, summaries, queries.routing, spec)
        if walk is None:
            continue
        _, dscores = _score_gradient(block, grad, walk, keys, values, upstream, spec)
        dq = torch.einsum("bhgts,bhsd->bhgtd", dscores, _gather(keys, walk)) * spec.scale
        if walk.ids:
            udp = walk.slopes * _prior_gradient(dscores, walk, spec).unsqueeze(2)  # [B, Hkv, G, C, j]
            before.weighted_sum[:, block.tokens] += _to_tokens(udp.sum(-1))
            before.slope_sum[:, block.tokens] += _to_tokens(walk.slopes.sum(-1))
            dq += torch.einsum("bhgtj,bjhd->bhgtd", udp * spec.routing_logit_scale, summaries[:, walk.ids])
        before.dq[:, block.tokens] += _to_tokens(dq)
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
    for block in _query_blocks(queries.q, queries.chunks, queries.summaries.shape[2]):
        if block.chunk == block.first:
            continue
        past = queries.summaries[:, block.earlier]
        p = _probabilities(_routing_scores(block.q, past, spec), block.rows(queries.routing.tau), spec)
        dz = -block.rows(ratio).unsqueeze(-1) * _slopes(p, spec) * spec.routing_logit_scale
        sums.dq[:, block.tokens] += _to_tokens(torch.einsum("bhgtj,bjhd->bhgtd", dz, past))
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
    rectangle = _Rectangle.of(part, summaries.shape, spec)
    part = rectangle.part
    keys, values = (_chunked(x, part.chunks, spec).to(summaries.dtype) for x in (part.k, part.v))
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dsummaries = summaries.new_zeros(summaries.shape[0], len(part.chunks), *summaries.shape[2:])
    for block, grad in _blocks_with_gradient(queries, upstream):
        walk = _walk(block, part.chunks, summaries, queries.routing, spec)
        if walk is None:
            continue
        weights, dscores = _score_gradient(block, grad, walk, keys, values, upstream, spec)
        _scatter_add(dvalues, walk, torch.einsum("bhgts,bhgtd->bhsd", weights, grad))
        _scatter_add(dkeys, walk, torch.einsum("bhgts,bhgtd->bhsd", dscores, block.q) * spec.scale)
        if walk.ids:
            dp = _prior_gradient(dscores, walk, spec).unsqueeze(2)
            dz = walk.slopes * (dp - block.rows(ratio).unsqueeze(-1)) * spec.routing_logit_scale
            dsummaries[:, walk.slots[: len(walk.ids)]] += torch.einsum("bhgtj,bhgtd->bjhd", dz, block.q)
    dkv = torch.stack([_unchunked(x, part.chunks) for x in (dkeys, dvalues)])
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
    dk[:, _token_index(part.chunks, spec, dk.device)[complete]] += dkeys
    return torch.einsum("bnch,bnchd->hd", dlogits, keys)


@dataclass(frozen=True)
class _Rectangle:
    """A part with all heads of its chunks: blocks are put where they belong, with zeros between them."""

    part: Part
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # (batch, slot, head) of each block

    @classmethod
    def of(cls, part: Part | Blocks, of_summaries: torch.Size, spec: AttentionSpec) -> _Rectangle:
        if isinstance(part, Part):
            return cls(part, None)
        batch, n, heads, head_dim = of_summaries
        ids, slot = (part.addresses % n).unique(return_inverse=True)
        row = part.addresses // n
        places = row // heads, slot, row % heads
        k, v = (part.kv.new_zeros(batch, len(ids), spec.chunk_size, heads, head_dim) for _ in range(2))
        k[places[0], places[1], :, places[2]] = part.kv[:, 0]
        v[places[0], places[1], :, places[2]] = part.kv[:, 1]
        chunks = ChunkGrid.complete(ids.tolist(), spec.chunk_size)
        return cls(Part(k.flatten(1, 2), v.flatten(1, 2), chunks), places)

    def like_the_part(self, dkv: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """[2, B, S, Hkv, D] as the gradient of the part that was given."""
        if self.places is None:
            return dkv
        batch, slot, head = self.places
        by_chunk = dkv.unflatten(2, (len(self.part.chunks), spec.chunk_size))
        return by_chunk[:, batch, slot, :, head]  # [blocks, 2, C, D]


@dataclass(frozen=True)
class _QueryBlock:
    """One chunk of queries: where its tokens are in the tensor, its id, that of its document's first chunk, and
    q [B, Hkv, G, C, D].
    """

    tokens: slice
    chunk: int
    first: int
    q: torch.Tensor

    @property
    def earlier(self) -> slice:
        """Ids of the chunks that the queries may be routed to."""
        return slice(self.first, self.chunk)

    def rows(self, per_token: torch.Tensor) -> torch.Tensor:
        """This block's part of a [B, T, Hq] tensor as [B, Hkv, G, C]."""
        return per_token[:, self.tokens].unflatten(2, self.q.shape[1:3]).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class _Walk:
    """What one block of queries attends to in one part of the sequence: u earlier chunks, then perhaps its own."""

    slots: list[int]  # places in the part of the u earlier chunks, then of the own chunk if the part holds it
    ids: list[int]  # chunk ids of the u earlier chunks
    prior: torch.Tensor  # [B, Hkv, C, u]
    slopes: torch.Tensor  # [B, Hkv, G, C, u]
    bias: torch.Tensor  # [B, Hkv, C, u], -inf where a token did not select the chunk
    own: bool


def _query_blocks(q: torch.Tensor, query_chunks: ChunkGrid, kv_heads: int) -> Iterator[_QueryBlock]:
    accumulate = accumulation_dtype(q.dtype)
    for chunk, start, length, first in query_chunks.on(torch.device("cpu")).T.tolist():
        tokens = slice(start, start + length)
        rows = q[:, tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        yield _QueryBlock(tokens, chunk, first, rows.to(accumulate))


def _blocks_with_gradient(queries: Queries, upstream: OutputGradient) -> Iterator[tuple[_QueryBlock, torch.Tensor]]:
    """Every block of queries with the gradient of its outputs [B, Hkv, G, C, D]."""
    kv_heads = queries.summaries.shape[2]
    blocks, gradients = (_query_blocks(x, queries.chunks, kv_heads) for x in (queries.q, upstream.grad))
    for block, gradient in zip(blocks, gradients, strict=True):
        yield block, gradient.q


def _walk(
    block: _QueryBlock, part_chunks: ChunkGrid, summaries: torch.Tensor, routing: Routing, spec: AttentionSpec
) -> _Walk | None:
    """The chunks of this part that any query of the block selected; None when there are none."""
    slot_of = part_chunks.slots_by_id(summaries.shape[1], torch.device("cpu"))
    slots = slot_of[block.earlier]
    held = slots >= 0
    ids = (held.nonzero().flatten() + block.first).to(summaries.device)
    own = int(slot_of[block.chunk])
    p = _probabilities(_routing_scores(block.q, summaries[:, ids], spec), block.rows(routing.tau), spec)
    prior = p.mean(2)
    union = (prior > 0).flatten(0, 2).any(0).nonzero().flatten()
    if own < 0 and union.numel() == 0:
        return None
    prior = prior[..., union]
    log_mean = routing.log_mean[:, block.tokens].transpose(1, 2).unsqueeze(-1)
    routed = prior > 0
    bias = (torch.where(routed, prior, 1.0).log() - log_mean) * spec.prior_exponent
    return _Walk(
        slots=slots[held][union.cpu()].tolist() + ([own] if own >= 0 else []),
        ids=ids[union].tolist(),
        prior=prior,
        slopes=_slopes(p[..., union], spec),
        bias=torch.where(routed, bias, -math.inf),
        own=own >= 0,
    )


def _biased_scores(block: _QueryBlock, walk: _Walk, keys: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Scores [B, Hkv, G, C, slots x C] of a block of queries; -inf where a key is not selected or in the future."""
    scores = torch.einsum("bhgtd,bhsd->bhgts", block.q * spec.scale, _gather(keys, walk))
    length = block.q.shape[3]
    by_chunk = scores.unflatten(-1, (-1, spec.chunk_size))
    earlier = len(walk.ids)
    by_chunk[..., :earlier, :] += walk.bias.unsqueeze(2).unsqueeze(-1)
    if walk.own:
        future = torch.ones(length, spec.chunk_size, dtype=torch.bool, device=scores.device).triu(1)
        by_chunk[..., earlier, :].masked_fill_(future, -math.inf)
    return scores


def _score_gradient(
    block: _QueryBlock,
    grad: torch.Tensor,
    walk: _Walk,
    keys: torch.Tensor,
    values: torch.Tensor,
    upstream: OutputGradient,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax weights, gradient of the biased scores) of a block of queries, [B, Hkv, G, C, slots x C]."""
    weights = torch.exp(_biased_scores(block, walk, keys, spec) - block.rows(upstream.lse).unsqueeze(-1))
    dweights = torch.einsum("bhgtd,bhsd->bhgts", grad, _gather(values, walk))
    return weights, weights * (dweights - block.rows(upstream.delta).unsqueeze(-1))


def _prior_gradient(dscores: torch.Tensor, walk: _Walk, spec: AttentionSpec) -> torch.Tensor:
    """dp of each head, [B, Hkv, C, u]."""
    dbias = dscores.unflatten(-1, (-1, spec.chunk_size)).sum((2, -1))[..., : len(walk.ids)]
    return dbias * (spec.prior_exponent / dscores.shape[2]) / walk.prior.clamp(min=PRIOR_FLOOR)


def _routing_scores(q: torch.Tensor, summaries: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """x = (alpha - 1) z [B, Hkv, G, C, j] of a block of queries against summaries [B, j, Hkv, D]."""
    factor = (spec.alpha - 1) * spec.routing_logit_scale
    return torch.einsum("bhgtd,bjhd->bhgtj", q * factor, summaries)


def _probabilities(x: torch.Tensor, tau: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    return (x - tau.unsqueeze(-1)).clamp(min=0).pow(1 / (spec.alpha - 1))


def _slopes(p: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """u = p^(2 - alpha), zero outside the support (also for alpha = 2, where 0^0 would be 1)."""
    return torch.where(p > 0, p.pow(2 - spec.alpha), 0.0)


def _token_index(chunks: ChunkGrid, spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """int64 [slots, C]: where each token of each chunk is in the tensor; one past the end where a chunk has none."""
    _, starts, lengths, _ = chunks.on(device).long().unsqueeze(-1)
    offsets = torch.arange(spec.chunk_size, device=device)
    return torch.where(offsets < lengths, starts + offsets, chunks.tokens)


def _chunked(x: torch.Tensor, chunks: ChunkGrid, spec: AttentionSpec) -> torch.Tensor:
    """[B, S, Hkv, D] -> [B, slots, C, Hkv, D]; the zeros that fill an incomplete chunk lie in every query's future."""
    return F.pad(x, (0, 0, 0, 0, 0, 1))[:, _token_index(chunks, spec, x.device)]


def _unchunked(x: torch.Tensor, chunks: ChunkGrid) -> torch.Tensor:
    """[B, slots, C, Hkv, D] -> [B, S, Hkv, D]: the inverse of `_chunked`, zeros where the grid has no chunk."""
    _, starts, lengths, _ = chunks.on(x.device).long().unsqueeze(-1)
    offsets = torch.arange(x.shape[2], device=x.device)
    tokens = x.new_zeros(x.shape[0], chunks.tokens, *x.shape[3:])
    tokens[:, (starts + offsets)[offsets < lengths]] = x[:, offsets < lengths]
    return tokens


def _gather(chunks: torch.Tensor, walk: _Walk) -> torch.Tensor:
    """The walked chunks as keys [B, Hkv, slots x C, D]."""
    return chunks[:, walk.slots].flatten(1, 2).transpose(1, 2)


def _scatter_add(chunks: torch.Tensor, walk: _Walk, gradient: torch.Tensor) -> None:
    chunks[:, walk.slots] += gradient.transpose(1, 2).unflatten(1, (len(walk.slots), -1))


def _to_tokens(rows: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, G, C, ...] -> [B, C, Hq, ...]."""
    return rows.movedim(3, 1).flatten(2, 3)

"""The stages in vectorised PyTorch, one chunk of queries at a time: memory linear in T on any device and float dtype.

A loop step holds the scores of one chunk of queries against the chunks that any of them selected, so work follows the
density and no buffer grows with T x T. Every backward pass is the hand-written one of the definition. Runs in float32
(float64 for float64 inputs) whatever the inputs' dtype. Knows nothing of ranks: K and V may be any part of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dash_kernels.chunks import ChunkGrid
from dash_kernels.entmax import entmax_threshold
from dash_kernels.spec import PRIOR_FLOOR, AttentionSpec, GradientSums, Part, Routing, accumulation_dtype


def summarize(k: torch.Tensor, chunks: ChunkGrid, summary_query: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Stage 1: k [B, S, Hkv, D] -> a summary per chunk [B, slots, Hkv, D] in the accumulation dtype.

    Incomplete chunks have zeros: nobody is ever routed to them.
    """
    complete, keys, weights = _summary_weights(k, chunks, summary_query, spec)
    summaries = keys.new_zeros(k.shape[0], len(chunks), *k.shape[2:])
    summaries[:, complete] = torch.einsum("bnch,bnchd->bnhd", weights, keys)
    return summaries


def summarize_backward(
    grad: torch.Tensor,
    k: torch.Tensor,
    chunks: ChunkGrid,
    summary_query: torch.Tensor,
    spec: AttentionSpec,
    dk: torch.Tensor,
) -> torch.Tensor:
    """From the gradient of the summaries [B, slots, Hkv, D]: adds that of k to dk [B, S, Hkv, D]; returns that of
    summary_query [Hkv, D], in the accumulation dtype.
    """
    complete, keys, weights = _summary_weights(k, chunks, summary_query, spec)
    grad = grad[:, complete]
    along = torch.einsum("bnhd,bnchd->bnch", grad, keys)
    dlogits = weights * (along - (weights * along).sum(2, keepdim=True)) * spec.scale
    dkeys = weights.unsqueeze(-1) * grad.unsqueeze(2) + dlogits.unsqueeze(-1) * summary_query.to(grad)
    dk[:, _token_index(chunks, spec, k.device)[complete]] += dkeys
    return torch.einsum("bnch,bnchd->hd", dlogits, keys)


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
    for block in _query_blocks(q, query_chunks, kv_heads):
        if block.chunk == block.first:
            continue
        x = _routing_scores(block.q, summaries[:, block.earlier], spec)
        threshold = entmax_threshold(x, spec.alpha)
        prior = _probabilities(x, threshold, spec).mean(2)  # [B, Hkv, C, j]
        routed = prior > 0
        count = routed.sum(-1)
        tau[:, block.tokens] = _to_tokens(threshold)
        selected[:, block.tokens] = (count + 1).to(torch.int32).transpose(1, 2)
        if spec.prior_sigma is not None:
            mean = torch.where(routed, prior, 1.0).log().sum(-1) / count.clamp(min=1)
            log_mean[:, block.tokens] = mean.transpose(1, 2)
    return Routing(tau, log_mean, selected)


def route_backward(
    q: torch.Tensor,
    query_chunks: ChunkGrid,
    summaries: torch.Tensor,
    routing: Routing,
    spec: AttentionSpec,
    sums: GradientSums,
) -> None:
    """The part of stage 2's gradient that needs a whole row, added to sums.dq and sums.dsummaries.

    With u = p^(2 - alpha) and dz = u (dp - sum(u dp) / sum(u)), `attend_backward` has added the first term and left
    sum(u dp) in sums.weighted_sum; the second term needs no key and no value.
    """
    for block in _query_blocks(q, query_chunks, summaries.shape[2]):
        if block.chunk == block.first:
            continue
        past = summaries[:, block.earlier]
        x = _routing_scores(block.q, past, spec)
        u = _slopes(_probabilities(x, block.rows(routing.tau), spec), spec)
        total = u.sum(-1)
        # The sum is 0 only where the scores exceed what their dtype can tell apart.
        ratio = block.rows(sums.weighted_sum) / torch.where(total > 0, total, 1.0)
        dz = -ratio.unsqueeze(-1) * u * spec.routing_logit_scale
        sums.dq[:, block.tokens] += _to_tokens(torch.einsum("bhgtj,bjhd->bhgtd", dz, past))
        sums.dsummaries[:, block.earlier] += torch.einsum("bhgtj,bhgtd->bjhd", dz, block.q)


def attend(
    q: torch.Tensor,
    query_chunks: ChunkGrid,
    part: Part,
    summaries: torch.Tensor,
    routing: Routing,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 3 over a part of the sequence.

    Returns the output [B, T, Hq, D], normalised over this part, and its log-sum-exp [B, T, Hq] (-inf where a query
    selected nothing of it), both in the accumulation dtype: parts merge by log-sum-exp. The output of a part that is
    whole needs no merging and is in q's dtype.
    """
    dtype = summaries.dtype
    keys, values = (_chunked(x, part.chunks, spec).to(dtype) for x in (part.k, part.v))
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for block in _query_blocks(q, query_chunks, part.k.shape[2]):
        walk = _walk(block, part.chunks, summaries, routing, spec)
        if walk is None:
            continue
        scores = _biased_scores(block, walk, keys, spec)
        block_lse = torch.logsumexp(scores, dim=-1)
        finite = torch.where(block_lse == -math.inf, 0.0, block_lse)
        weights = torch.exp(scores - finite.unsqueeze(-1))
        out[:, block.tokens] = _to_tokens(torch.einsum("bhgts,bhsd->bhgtd", weights, _gather(values, walk)))
        lse[:, block.tokens] = _to_tokens(block_lse)
    return out.to(q.dtype) if part.whole else out, lse


def row_dots(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """delta [B, T, Hq] = sum over D of grad * out, both [B, T, Hq, D]; in the accumulation dtype."""
    dtype = accumulation_dtype(grad.dtype)
    return (grad.to(dtype) * out.to(dtype)).sum(-1)


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    query_chunks: ChunkGrid,
    part: Part,
    summary_query: torch.Tensor,
    summaries: torch.Tensor,
    routing: Routing,
    lse: torch.Tensor,
    delta: torch.Tensor,
    spec: AttentionSpec,
    sums: GradientSums,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of stage 3 over a part of the sequence, and of the routing to its chunks but for the row sums.

    Returns the gradients of the part's k and v, [2, *k.shape], and of summary_query [Hkv, D], both in the accumulation
    dtype; adds the part's contribution to sums.dq and sums.weighted_sum. Whoever selected a chunk has its keys, so the
    gradient of its summary goes through stage 1 here, into k's.

    grad [B, T, Hq, D] is that of the merged output; lse and delta (`row_dots`) [B, T, Hq] are of the whole row.
    """
    dtype = summaries.dtype
    kv_heads = part.k.shape[2]
    keys, values = (_chunked(x, part.chunks, spec).to(dtype) for x in (part.k, part.v))
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dsummaries = summaries.new_zeros(summaries.shape[0], len(part.chunks), *summaries.shape[2:])
    for block, block_grad in zip(
        _query_blocks(q, query_chunks, kv_heads), _query_blocks(grad, query_chunks, kv_heads), strict=True
    ):
        walk = _walk(block, part.chunks, summaries, routing, spec)
        if walk is None:
            continue
        block_keys, block_values = _gather(keys, walk), _gather(values, walk)
        # lse is that of the whole row, never -inf: a token always attends to itself
        weights = torch.exp(_biased_scores(block, walk, keys, spec) - block.rows(lse).unsqueeze(-1))
        dweights = torch.einsum("bhgtd,bhsd->bhgts", block_grad.q, block_values)
        dscores = weights * (dweights - block.rows(delta).unsqueeze(-1))
        _scatter_add(dvalues, walk, torch.einsum("bhgts,bhgtd->bhsd", weights, block_grad.q))
        _scatter_add(dkeys, walk, torch.einsum("bhgts,bhgtd->bhsd", dscores, block.q) * spec.scale)
        dq_block = torch.einsum("bhgts,bhsd->bhgtd", dscores, block_keys) * spec.scale
        if walk.ids:
            dbias = dscores.unflatten(-1, (-1, spec.chunk_size)).sum((2, -1))[..., : len(walk.ids)]  # [B, Hkv, C, j]
            group = block.q.shape[2]
            dp = dbias * (spec.prior_exponent / group) / walk.prior.clamp(min=PRIOR_FLOOR)
            udp = walk.slopes * dp.unsqueeze(2)  # [B, Hkv, G, C, j]
            sums.weighted_sum[:, block.tokens] += _to_tokens(udp.sum(-1))
            udp = udp * spec.routing_logit_scale
            past = summaries[:, walk.ids]
            dq_block += torch.einsum("bhgtj,bjhd->bhgtd", udp, past)
            dsummaries[:, walk.slots[: len(walk.ids)]] += torch.einsum("bhgtj,bhgtd->bjhd", udp, block.q)
        sums.dq[:, block.tokens] += _to_tokens(dq_block)
    dkv = torch.stack([_unchunked(x, part.chunks) for x in (dkeys, dvalues)])
    return dkv, summarize_backward(dsummaries, part.k, part.chunks, summary_query, spec, dkv[0])


def backward_whole(
    grad: torch.Tensor,
    q: torch.Tensor,
    query_chunks: ChunkGrid,
    part: Part,
    summary_query: torch.Tensor,
    summaries: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All gradients at once where the part is whole: `attend_backward`, `route_backward` and `summarize_backward`.

    Returns the gradients of q, in its dtype, of the part's k and v, [2, *k.shape], and of summary_query [Hkv, D], the
    last two in the accumulation dtype. grad and out are [B, T, Hq, D], lse is [B, T, Hq].
    """
    sums = GradientSums.zeros(q, summaries)
    delta = row_dots(grad, out)
    dkv, dsummary_query = attend_backward(
        grad, q, query_chunks, part, summary_query, summaries, routing, lse, delta, spec, sums
    )
    route_backward(q, query_chunks, summaries, routing, spec, sums)
    dsummaries = sums.dsummaries[:, part.chunks.on(q.device)[0]]
    dsummary_query += summarize_backward(dsummaries, part.k, part.chunks, summary_query, spec, dkv[0])
    return sums.dq.to(q.dtype), dkv, dsummary_query


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


def _query_blocks(q: torch.Tensor, query_chunks: ChunkGrid, kv_heads: int) -> list[_QueryBlock]:
    accumulate = accumulation_dtype(q.dtype)
    blocks = []
    for chunk, start, length, first in query_chunks.on(torch.device("cpu")).T.tolist():
        tokens = slice(start, start + length)
        rows = q[:, tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        blocks.append(_QueryBlock(tokens, chunk, first, rows.to(accumulate)))
    return blocks


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
    """[B, slots, C, Hkv, D] -> [B, S, Hkv, D]: the inverse of `_chunked`."""
    lengths = chunks.on(x.device)[2].unsqueeze(-1)
    return x[:, torch.arange(x.shape[2], device=x.device) < lengths]


def _gather(chunks: torch.Tensor, walk: _Walk) -> torch.Tensor:
    """The walked chunks as keys [B, Hkv, slots x C, D]."""
    return chunks[:, walk.slots].flatten(1, 2).transpose(1, 2)


def _scatter_add(chunks: torch.Tensor, walk: _Walk, gradient: torch.Tensor) -> None:
    chunks[:, walk.slots] += gradient.transpose(1, 2).unflatten(1, (len(walk.slots), -1))


def _to_tokens(rows: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, G, C, ...] -> [B, C, Hq, ...]."""
    return rows.movedim(3, 1).flatten(2, 3)

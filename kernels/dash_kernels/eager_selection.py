"""Selections of the eager stages: one chunk of queries at a time, with the chunks of a part that it selected.

Knows how chunks lie in tensors and the formulas of scores and probabilities; does not know the stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import (
    PRIOR_FLOOR,
    AttentionSpec,
    Blocks,
    OutputGradient,
    Part,
    Queries,
    Routing,
    accumulation_dtype,
)


@dataclass(frozen=True)
class DensePart:
    """Part with all heads of its chunks: blocks are put in their places, with zeros between them."""

    part: Part
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # (batch, slot, head) per block; None for a `Part`

    @classmethod
    def of(cls, part: Part | Blocks, summaries_shape: torch.Size, spec: AttentionSpec) -> DensePart:
        if isinstance(part, Part):
            return cls(part, None)
        batch, n, heads, _ = summaries_shape
        ids, slot = (part.addresses % n).unique(return_inverse=True)
        row = part.addresses // n
        places = row // heads, slot, row % heads
        k, v = (part.kv.new_zeros(batch, len(ids), spec.chunk_size, heads, part.kv.shape[-1]) for _ in range(2))
        k[places[0], places[1], :, places[2]] = part.kv[:, 0]
        v[places[0], places[1], :, places[2]] = part.kv[:, 1]
        chunks = ChunkGrid.complete(ids.tolist(), spec.chunk_size)
        return cls(Part(k.flatten(1, 2), v.flatten(1, 2), chunks), places)

    def to_blocks(self, dkv: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Takes the gradient of the given part from [2, B, S, Hkv, D]: unchanged for a `Part`, else its blocks."""
        if self.places is None:
            return dkv
        batch, slot, head = self.places
        by_chunk = dkv.unflatten(2, (len(self.part.chunks), spec.chunk_size))
        return by_chunk[:, batch, slot, :, head]  # [blocks, 2, C, D]


@dataclass(frozen=True)
class QueryChunk:
    """One chunk of queries: its tokens in the tensor, its id, the id of its document's first chunk, and the queries.

    q: [B, Hkv, G, C, D]
    """

    tokens: slice
    id: int
    first: int
    q: torch.Tensor

    @property
    def earlier(self) -> slice:
        """Ids of the chunks to which the queries may be routed."""
        return slice(self.first, self.id)

    def rows(self, per_token: torch.Tensor) -> torch.Tensor:
        """Rows of this chunk in a [B, T, Hq] tensor, as [B, Hkv, G, C]."""
        return per_token[:, self.tokens].unflatten(2, self.q.shape[1:3]).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Selection:
    """Chunks of a part that one chunk of queries attends to: j earlier ones, then its own if the part holds it."""

    slots: list[int]  # slots in the part of the j earlier chunks, then of the own chunk
    ids: list[int]  # chunk ids of the j earlier chunks
    prior: torch.Tensor  # P [B, Hkv, C, j]
    slopes: torch.Tensor | None  # u [B, Hkv, G, C, j]; None where no gradient passes through the selection
    bias: torch.Tensor  # b [B, Hkv, C, j], -inf where a token did not select the chunk
    own: bool  # the part holds the own chunk


def query_chunks(q: torch.Tensor, chunks: ChunkGrid, kv_heads: int) -> Iterator[QueryChunk]:
    """Yields the chunks of q [B, T, Hq, D], in the accumulation dtype."""
    accumulate = accumulation_dtype(q.dtype)
    for chunk, start, length, first in chunks.on(torch.device("cpu")).T.tolist():
        tokens = slice(start, start + length)
        rows = q[:, tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        yield QueryChunk(tokens, chunk, first, rows.to(accumulate))


def chunks_with_gradient(queries: Queries, upstream: OutputGradient) -> Iterator[tuple[QueryChunk, torch.Tensor]]:
    """Yields every chunk of queries with the gradient of its outputs [B, Hkv, G, C, D]."""
    kv_heads = queries.summaries.shape[2]
    chunks, gradients = (query_chunks(x, queries.chunks, kv_heads) for x in (queries.q, upstream.grad))
    for chunk, gradient in zip(chunks, gradients, strict=True):
        yield chunk, gradient.q


def select(
    chunk: QueryChunk, part_chunks: ChunkGrid, summaries: torch.Tensor, routing: Routing, spec: AttentionSpec
) -> Selection | None:
    """The chunks of this part that any query of the chunk selected; None without any."""
    slot_of = part_chunks.slots_by_id(summaries.shape[1], torch.device("cpu"))
    slots = slot_of[chunk.earlier]
    held = slots >= 0
    ids = (held.nonzero().flatten() + chunk.first).to(summaries.device)
    own = int(slot_of[chunk.id])
    p: torch.Tensor | None = None
    if routing.lists is None:
        p = probabilities(routing_scores(chunk.q, summaries[:, ids], spec), chunk.rows(routing.tau), spec)
        prior = p.mean(2)
    else:
        prior = routing.listed(chunk.tokens, summaries.shape[1])[..., ids].to(summaries.dtype)
    union = (prior > 0).flatten(0, 2).any(0).nonzero().flatten()
    if own < 0 and union.numel() == 0:
        return None
    prior = prior[..., union]
    routed = prior > 0
    bias = torch.zeros_like(prior)
    if p is not None:
        log_mean = routing.log_mean[:, chunk.tokens].transpose(1, 2).unsqueeze(-1)
        bias = (torch.where(routed, prior, 1.0).log() - log_mean) * spec.prior_exponent
    return Selection(
        slots=slots[held][union.cpu()].tolist() + ([own] if own >= 0 else []),
        ids=ids[union].tolist(),
        prior=prior,
        slopes=None if p is None else slopes(p[..., union], spec),
        bias=torch.where(routed, bias, -math.inf),
        own=own >= 0,
    )


def biased_scores(chunk: QueryChunk, selection: Selection, keys: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Biased scores [B, Hkv, G, C, slots x C]; -inf where a key is not selected or in the future."""
    scores = torch.einsum("bhgtd,bhsd->bhgts", chunk.q * spec.scale, gather_keys(keys, selection))
    length = chunk.q.shape[3]
    by_chunk = scores.unflatten(-1, (-1, spec.chunk_size))
    earlier = len(selection.ids)
    by_chunk[..., :earlier, :] += selection.bias.unsqueeze(2).unsqueeze(-1)
    if selection.own:
        future = torch.ones(length, spec.chunk_size, dtype=torch.bool, device=scores.device).triu(1)
        by_chunk[..., earlier, :].masked_fill_(future, -math.inf)
    return scores


def score_gradient(
    chunk: QueryChunk,
    grad: torch.Tensor,
    selection: Selection,
    keys: torch.Tensor,
    values: torch.Tensor,
    upstream: OutputGradient,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax weights, gradient of the biased scores), both [B, Hkv, G, C, slots x C]."""
    weights = torch.exp(biased_scores(chunk, selection, keys, spec) - chunk.rows(upstream.lse).unsqueeze(-1))
    dweights = torch.einsum("bhgtd,bhsd->bhgts", grad, gather_keys(values, selection))
    return weights, weights * (dweights - chunk.rows(upstream.delta).unsqueeze(-1))


def probability_gradient(dscores: torch.Tensor, selection: Selection, spec: AttentionSpec) -> torch.Tensor:
    """dp, the gradient of the entmax probability of every head of a group: dprior / G, [B, Hkv, C, j]."""
    dbias = dscores.unflatten(-1, (-1, spec.chunk_size)).sum((2, -1))[..., : len(selection.ids)]  # dB
    return dbias * (spec.prior_exponent / dscores.shape[2]) / selection.prior.clamp(min=PRIOR_FLOOR)


def routing_scores(q: torch.Tensor, summaries: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """x = (alpha - 1) z [B, Hkv, G, C, j] of queries [B, Hkv, G, C, D] against summaries [B, j, Hkv, D]."""
    factor = (spec.alpha - 1) * spec.routing_logit_scale
    return torch.einsum("bhgtd,bjhd->bhgtj", q * factor, summaries)


def probabilities(x: torch.Tensor, tau: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """p = max(0, x - tau)^(1 / (alpha - 1)), entmax probabilities [..., j] at the thresholds tau [...]."""
    return (x - tau.unsqueeze(-1)).clamp(min=0).pow(1 / (spec.alpha - 1))


def slopes(p: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """u = p^(2 - alpha), zero outside the support (also for alpha = 2, where 0^0 would be 1)."""
    return torch.where(p > 0, p.pow(2 - spec.alpha), 0.0)


def token_index(chunks: ChunkGrid, spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """Offset in the tensor of each token of each chunk, int64 [slots, C]; one past the end if a chunk has none."""
    _, starts, lengths, _ = chunks.on(device).long().unsqueeze(-1)
    offsets = torch.arange(spec.chunk_size, device=device)
    return torch.where(offsets < lengths, starts + offsets, chunks.tokens)


def chunked(x: torch.Tensor, chunks: ChunkGrid, spec: AttentionSpec) -> torch.Tensor:
    """[B, S, Hkv, D] -> [B, slots, C, Hkv, D]. Zeros fill an incomplete chunk, in the future of every query."""
    return F.pad(x, (0, 0, 0, 0, 0, 1))[:, token_index(chunks, spec, x.device)]


def unchunked(x: torch.Tensor, chunks: ChunkGrid) -> torch.Tensor:
    """[B, slots, C, Hkv, D] -> [B, S, Hkv, D]: inverse of `chunked`, zeros where the grid has no chunk."""
    _, starts, lengths, _ = chunks.on(x.device).long().unsqueeze(-1)
    offsets = torch.arange(x.shape[2], device=x.device)
    tokens = x.new_zeros(x.shape[0], chunks.tokens, *x.shape[3:])
    tokens[:, (starts + offsets)[offsets < lengths]] = x[:, offsets < lengths]
    return tokens


def gather_keys(chunks: torch.Tensor, selection: Selection) -> torch.Tensor:
    """The selected chunks as keys [B, Hkv, slots x C, D]."""
    return chunks[:, selection.slots].flatten(1, 2).transpose(1, 2)


def scatter_add(chunks: torch.Tensor, selection: Selection, gradient: torch.Tensor) -> None:
    """Adds a gradient [B, Hkv, slots x C, D] to the selected chunks of [B, slots, C, Hkv, D]."""
    chunks[:, selection.slots] += gradient.transpose(1, 2).unflatten(1, (len(selection.slots), -1))


def to_tokens(rows: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, G, C, ...] -> [B, C, Hq, ...]."""
    return rows.movedim(3, 1).flatten(2, 3)

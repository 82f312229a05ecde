"""What the eager stages walk: blocks of queries, the chunks of a part that a block selected, and both as tensors.

Knows how chunks lie in tensors and the formulae of scores; does not know which stage asks.
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
class Rectangle:
    """A part with all heads of its chunks: blocks are put where they belong, with zeros between them."""

    part: Part
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # (batch, slot, head) of each block

    @classmethod
    def of(cls, part: Part | Blocks, of_summaries: torch.Size, spec: AttentionSpec) -> Rectangle:
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
class QueryBlock:
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
class Walk:
    """What one block of queries attends to in one part of the sequence: u earlier chunks, then perhaps its own."""

    slots: list[int]  # places in the part of the u earlier chunks, then of the own chunk if the part holds it
    ids: list[int]  # chunk ids of the u earlier chunks
    prior: torch.Tensor  # [B, Hkv, C, u]
    slopes: torch.Tensor  # [B, Hkv, G, C, u]
    bias: torch.Tensor  # [B, Hkv, C, u], -inf where a token did not select the chunk
    own: bool


def query_blocks(q: torch.Tensor, query_chunks: ChunkGrid, kv_heads: int) -> Iterator[QueryBlock]:
    accumulate = accumulation_dtype(q.dtype)
    for chunk, start, length, first in query_chunks.on(torch.device("cpu")).T.tolist():
        tokens = slice(start, start + length)
        rows = q[:, tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        yield QueryBlock(tokens, chunk, first, rows.to(accumulate))


def blocks_with_gradient(queries: Queries, upstream: OutputGradient) -> Iterator[tuple[QueryBlock, torch.Tensor]]:
    """Every block of queries with the gradient of its outputs [B, Hkv, G, C, D]."""
    kv_heads = queries.summaries.shape[2]
    blocks, gradients = (query_blocks(x, queries.chunks, kv_heads) for x in (queries.q, upstream.grad))
    for block, gradient in zip(blocks, gradients, strict=True):
        yield block, gradient.q


def walk_of(
    block: QueryBlock, part_chunks: ChunkGrid, summaries: torch.Tensor, routing: Routing, spec: AttentionSpec
) -> Walk | None:
    """The chunks of this part that any query of the block selected; None when there are none."""
    slot_of = part_chunks.slots_by_id(summaries.shape[1], torch.device("cpu"))
    slots = slot_of[block.earlier]
    held = slots >= 0
    ids = (held.nonzero().flatten() + block.first).to(summaries.device)
    own = int(slot_of[block.chunk])
    p = probabilities(routing_scores(block.q, summaries[:, ids], spec), block.rows(routing.tau), spec)
    prior = p.mean(2)
    union = (prior > 0).flatten(0, 2).any(0).nonzero().flatten()
    if own < 0 and union.numel() == 0:
        return None
    prior = prior[..., union]
    log_mean = routing.log_mean[:, block.tokens].transpose(1, 2).unsqueeze(-1)
    routed = prior > 0
    bias = (torch.where(routed, prior, 1.0).log() - log_mean) * spec.prior_exponent
    return Walk(
        slots=slots[held][union.cpu()].tolist() + ([own] if own >= 0 else []),
        ids=ids[union].tolist(),
        prior=prior,
        slopes=slopes(p[..., union], spec),
        bias=torch.where(routed, bias, -math.inf),
        own=own >= 0,
    )


def biased_scores(block: QueryBlock, walk: Walk, keys: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Scores [B, Hkv, G, C, slots x C] of a block of queries; -inf where a key is not selected or in the future."""
    scores = torch.einsum("bhgtd,bhsd->bhgts", block.q * spec.scale, gather_keys(keys, walk))
    length = block.q.shape[3]
    by_chunk = scores.unflatten(-1, (-1, spec.chunk_size))
    earlier = len(walk.ids)
    by_chunk[..., :earlier, :] += walk.bias.unsqueeze(2).unsqueeze(-1)
    if walk.own:
        future = torch.ones(length, spec.chunk_size, dtype=torch.bool, device=scores.device).triu(1)
        by_chunk[..., earlier, :].masked_fill_(future, -math.inf)
    return scores


def score_gradient(
    block: QueryBlock,
    grad: torch.Tensor,
    walk: Walk,
    keys: torch.Tensor,
    values: torch.Tensor,
    upstream: OutputGradient,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax weights, gradient of the biased scores) of a block of queries, [B, Hkv, G, C, slots x C]."""
    weights = torch.exp(biased_scores(block, walk, keys, spec) - block.rows(upstream.lse).unsqueeze(-1))
    dweights = torch.einsum("bhgtd,bhsd->bhgts", grad, gather_keys(values, walk))
    return weights, weights * (dweights - block.rows(upstream.delta).unsqueeze(-1))


def prior_gradient(dscores: torch.Tensor, walk: Walk, spec: AttentionSpec) -> torch.Tensor:
    """dp of each head, [B, Hkv, C, u]."""
    dbias = dscores.unflatten(-1, (-1, spec.chunk_size)).sum((2, -1))[..., : len(walk.ids)]
    return dbias * (spec.prior_exponent / dscores.shape[2]) / walk.prior.clamp(min=PRIOR_FLOOR)


def routing_scores(q: torch.Tensor, summaries: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """x = (alpha - 1) z [B, Hkv, G, C, j] of a block of queries against summaries [B, j, Hkv, D]."""
    factor = (spec.alpha - 1) * spec.routing_logit_scale
    return torch.einsum("bhgtd,bjhd->bhgtj", q * factor, summaries)


def probabilities(x: torch.Tensor, tau: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    return (x - tau.unsqueeze(-1)).clamp(min=0).pow(1 / (spec.alpha - 1))


def slopes(p: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """u = p^(2 - alpha), zero outside the support (also for alpha = 2, where 0^0 would be 1)."""
    return torch.where(p > 0, p.pow(2 - spec.alpha), 0.0)


def token_index(chunks: ChunkGrid, spec: AttentionSpec, device: torch.device) -> torch.Tensor:
    """int64 [slots, C]: where each token of each chunk is in the tensor; one past the end where a chunk has none."""
    _, starts, lengths, _ = chunks.on(device).long().unsqueeze(-1)
    offsets = torch.arange(spec.chunk_size, device=device)
    return torch.where(offsets < lengths, starts + offsets, chunks.tokens)


def chunked(x: torch.Tensor, chunks: ChunkGrid, spec: AttentionSpec) -> torch.Tensor:
    """[B, S, Hkv, D] -> [B, slots, C, Hkv, D]; the zeros that fill an incomplete chunk lie in every query's future."""
    return F.pad(x, (0, 0, 0, 0, 0, 1))[:, token_index(chunks, spec, x.device)]


def unchunked(x: torch.Tensor, chunks: ChunkGrid) -> torch.Tensor:
    """[B, slots, C, Hkv, D] -> [B, S, Hkv, D]: the inverse of `chunked`, zeros where the grid has no chunk."""
    _, starts, lengths, _ = chunks.on(x.device).long().unsqueeze(-1)
    offsets = torch.arange(x.shape[2], device=x.device)
    tokens = x.new_zeros(x.shape[0], chunks.tokens, *x.shape[3:])
    tokens[:, (starts + offsets)[offsets < lengths]] = x[:, offsets < lengths]
    return tokens


def gather_keys(chunks: torch.Tensor, walk: Walk) -> torch.Tensor:
    """The walked chunks as keys [B, Hkv, slots x C, D]."""
    return chunks[:, walk.slots].flatten(1, 2).transpose(1, 2)


def scatter_add(chunks: torch.Tensor, walk: Walk, gradient: torch.Tensor) -> None:
    chunks[:, walk.slots] += gradient.transpose(1, 2).unflatten(1, (len(walk.slots), -1))


def to_tokens(rows: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, G, C, ...] -> [B, C, Hq, ...]."""
    return rows.movedim(3, 1).flatten(2, 3)

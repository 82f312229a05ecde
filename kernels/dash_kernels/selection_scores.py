"""Scores of the rules in `selection`: what each chunk is worth to a block of queries.

Knows the formulas; does not know how the best are picked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dash_kernels.chunks import ChunkGrid
from dash_kernels.eager_selection import chunked
from dash_kernels.query_blocks import QueryBlock
from dash_kernels.selection import NSA, STRIDE, InfLLMv2
from dash_kernels.spec import AttentionSpec, accumulation_dtype


def chunk_scores(q: torch.Tensor, summaries: torch.Tensor, block: QueryBlock, spec: AttentionSpec) -> torch.Tensor:
    """Scores [B, Hkv, t, end] of queries [B, Hkv, G, t, D]: inf where a chunk is always selected, -inf where never."""
    if isinstance(spec.selection, InfLLMv2):
        return pooled_probabilities(q, summaries, block, spec, spec.selection)
    if isinstance(spec.selection, NSA):
        return overlap_probabilities(q, summaries, block, spec, spec.selection)
    return chunk_probabilities(q, summaries, block, spec)


def chunk_probabilities(
    q: torch.Tensor, summaries: torch.Tensor, block: QueryBlock, spec: AttentionSpec
) -> torch.Tensor:
    """Mean over a group's heads of the softmax of q . s over earlier chunks.

    A chunk whose scores are NaN is left out.
    """
    z = torch.einsum("bhgtd,bjhd->bhgtj", q * spec.routing_logit_scale, summaries[:, : block.end])
    allowed = block.earlier & ~z.isnan().any(2)
    p = torch.softmax(z.masked_fill_(~allowed.unsqueeze(2), -torch.inf), dim=-1).mean(2)
    return p.masked_fill_(~allowed, -torch.inf)  # rows with nothing allowed were NaN


def stride_means(k: torch.Tensor, chunks: ChunkGrid, spec: AttentionSpec) -> torch.Tensor:
    """Means of every 16 keys of k [B, S, Hkv, D], half a kernel of InfLLMv2 each: [B, slots, Hkv, C / 16 x D].

    Halves of kernels let one all-gather of whole chunks serve kernels that lie across shards. Those of an incomplete
    chunk that lack keys are in the future of every query.
    """
    by_stride = chunked(k, chunks, spec).to(accumulation_dtype(k.dtype)).unflatten(2, (-1, STRIDE))
    return by_stride.mean(3).transpose(2, 3).flatten(3)


def pooled_probabilities(
    q: torch.Tensor, halves: torch.Tensor, block: QueryBlock, spec: AttentionSpec, rule: InfLLMv2
) -> torch.Tensor:
    """Largest probability, summed over a group's heads, of the kernels that overlap a chunk; see `InfLLMv2`.

    halves: `stride_means` of the whole sequence, by chunk id.
    """
    by_stride = _by_stride(halves, block, spec)
    kernels = (by_stride[:, :-1] + by_stride[:, 1:]) / 2
    p = _probabilities(q, kernels, block, spec, ends_after=2)
    # Chunk j overlaps the kernels j x per_chunk - 1 to (j + 1) x per_chunk - 1.
    per_chunk = spec.chunk_size // STRIDE
    scores = F.max_pool1d(F.pad(p, (1, 1)).flatten(0, 2), per_chunk + 1, per_chunk).view(*p.shape[:3], block.end)
    return _with_always(scores, block, rule)


def overlap_probabilities(
    q: torch.Tensor, compressed: torch.Tensor, block: QueryBlock, spec: AttentionSpec, rule: NSA
) -> torch.Tensor:
    """Probability, summed over a group's heads, of the compressed blocks' halves that lie in a chunk; see `NSA`.

    compressed: `by_chunk` of the keys of the whole sequence.
    """
    p = _probabilities(q, _by_stride(compressed, block, spec), block, spec, ends_after=1)
    # The block that ends with a stride has a half in it, and so has the next one. That of the last stride is not seen.
    halves = p + F.pad(p[..., 1:], (0, 1))
    return _with_always(halves.unflatten(-1, (block.end, -1)).sum(-1), block, rule)


def by_chunk(keys: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Compressed keys of the strides of whole chunks, [B, n x C / 16, Hkv, D], as [B, n, Hkv, C / 16 x D] summaries."""
    wide = keys.to(accumulation_dtype(keys.dtype))
    return wide.unflatten(1, (-1, spec.chunk_size // STRIDE)).transpose(2, 3).flatten(3)


def _by_stride(summaries: torch.Tensor, block: QueryBlock, spec: AttentionSpec) -> torch.Tensor:
    """Vectors of the strides up to a block's end [B, i, Hkv, D], from [B, n, Hkv, C / 16 x D]."""
    per_chunk = spec.chunk_size // STRIDE
    return summaries[:, : block.end].unflatten(-1, (per_chunk, -1)).transpose(2, 3).flatten(1, 2)


def _probabilities(
    q: torch.Tensor, keys: torch.Tensor, block: QueryBlock, spec: AttentionSpec, *, ends_after: int
) -> torch.Tensor:
    """Softmax over keys [B, i, Hkv, D], summed over a group's heads: [B, Hkv, t, i], zeros where nothing is seen.

    Key i stands for the 32 tokens that end `ends_after` strides after the beginning of stride i. A token sees those of
    its document that end at or before it.
    """
    index = torch.arange(keys.shape[1], device=q.device)
    token = block.id * spec.chunk_size + block.place.unsqueeze(-1)  # as if all chunks before it were complete
    begins = index + ends_after - 2
    visible = (begins >= block.first * (spec.chunk_size // STRIDE)) & ((index + ends_after) * STRIDE - 1 <= token)
    z = torch.einsum("bhgtd,bihd->bhgti", q * spec.scale, keys)
    unseen = ~visible | z.isnan()
    return torch.softmax(z.masked_fill_(unseen, -torch.inf), dim=-1).masked_fill_(unseen, 0.0).sum(2)


def _with_always(scores: torch.Tensor, block: QueryBlock, rule: InfLLMv2 | NSA) -> torch.Tensor:
    always = (block.chunk < block.first + rule.first_chunks) | (block.id - block.chunk <= rule.local_chunks)
    return scores.masked_fill(always, torch.inf).masked_fill(~block.earlier, -torch.inf)

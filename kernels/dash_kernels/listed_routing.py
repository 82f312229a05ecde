"""Stage 2 of the rules in `selection`: every token's list of chunks, a block of queries at a time.

Knows how to pick the best chunks; does not know what a backend keeps besides the lists. Memory is that of the lists,
and of the scores of one block of queries against the chunks up to them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dash_kernels.chunks import ChunkGrid
from dash_kernels.query_blocks import QueryBlock, query_blocks
from dash_kernels.selection import InfLLMv2
from dash_kernels.selection_scores import chunk_scores
from dash_kernels.spec import AttentionSpec, Routing, accumulation_dtype

MAX_SCORES = 2**25
"""Scores of a block of queries, unless one chunk of them has more."""


def listed_routing(
    q: torch.Tensor,
    chunks: ChunkGrid,
    summaries: torch.Tensor,
    spec: AttentionSpec,
    masks: torch.Tensor,
    mark: Callable[[torch.Tensor, QueryBlock, torch.Tensor], None],
) -> Routing:
    """Select chunks for queries [B, T, Hq, D] by `spec.selection`.

    Args:
        summaries: of the whole sequence, by chunk id: those of DashAttention, or `stride_means`.
        masks: zeros, in the backend's form.
        mark: enters into them what a block of queries selected, bool [B, Hkv, t, chunks up to the block's end].
    """
    assert spec.selection is not None
    batch, seq_len, query_heads, head_dim = q.shape
    n, kv_heads, width = summaries.shape[1:]
    dense = _dense_slots(chunks, spec)
    longest = max(_most_earlier(chunks, dense), min(spec.selection.count - 1, n))
    lists = torch.full((batch, seq_len, kv_heads, longest), n, dtype=torch.int32, device=q.device)
    selected = torch.empty(batch, seq_len, kv_heads, dtype=torch.int32, device=q.device)
    row_scores = batch * query_heads * n * (width // head_dim)
    is_dense = None if dense is None else dense.to(q.device)
    for block in query_blocks(chunks, q.device, MAX_SCORES // max(row_scores, 1)):
        rows = q[:, block.tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, t, D]
        scores = chunk_scores(rows.to(accumulation_dtype(q.dtype)), summaries, block, spec)
        hits = largest(scores, spec.selection.count - 1)
        if is_dense is not None:
            hits |= is_dense[block.slot].unsqueeze(-1) & block.earlier
        mark(masks, block, hits)
        ids = torch.where(hits, block.chunk, n)
        filled = min(longest, block.end)
        lists[:, block.tokens, :, :filled] = ids.topk(filled, largest=False).values.transpose(1, 2).to(torch.int32)
        selected[:, block.tokens] = (hits.sum(-1) + 1).to(torch.int32).transpose(1, 2)
    empty = summaries.new_empty(0)
    return Routing(empty, empty, selected, masks, lists)


def _dense_slots(chunks: ChunkGrid, spec: AttentionSpec) -> torch.Tensor | None:
    """Slots whose queries select every earlier chunk, CPU bool [slots]; None where the rule knows no such."""
    if not isinstance(spec.selection, InfLLMv2):
        return None
    assert chunks.documents is not None, "a grid of queries knows its documents"
    return chunks.documents <= spec.selection.dense_length


def _most_earlier(chunks: ChunkGrid, dense: torch.Tensor | None) -> int:
    """Largest number of earlier chunks of a slot that selects all."""
    if dense is None or not dense.any():
        return 0
    return int((chunks.ids - chunks.firsts)[dense].max())


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` largest scores above -inf of each row [..., n]; of equal ones the first."""
    possible = scores > -torch.inf
    if count >= scores.shape[-1]:
        return possible
    last = scores.topk(count, dim=-1).values[..., -1:]
    above, equal = scores > last, scores == last
    room = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & possible


def tile_masks(masks: torch.Tensor, block: QueryBlock, hits: torch.Tensor, tile_tokens: int, per_chunk: int) -> None:
    """Enter what a block selected into int32 [B, Hkv, tiles, words], a bit per tile of queries and chunk."""
    begin = block.slots.start * per_chunk
    tile = block.slot * per_chunk + block.place // tile_tokens - begin
    counts = torch.zeros(
        *hits.shape[:2], len(block.slots) * per_chunk, block.end, dtype=torch.int32, device=hits.device
    )
    counts.index_add_(2, tile, hits.to(torch.int32))
    words = -(-block.end // 32)
    bits = F.pad(counts > 0, (0, words * 32 - block.end)).unflatten(-1, (words, 32)).to(torch.int32)
    packed = (bits << torch.arange(32, dtype=torch.int32, device=hits.device)).sum(-1, dtype=torch.int32)
    masks[:, :, begin : begin + counts.shape[2], :words] = packed

"""Stage 2 of the rules in `selection`: every token's list of chunks, a block of queries at a time.

Knows scores and how to pick the largest; does not know what a backend keeps besides the lists. Memory is that of the
lists, and of the scores of one block of queries against the chunks up to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dash_kernels.chunks import ChunkGrid
from dash_kernels.selection import Selection
from dash_kernels.spec import AttentionSpec, Routing, accumulation_dtype

MAX_SCORES = 2**25
"""Scores of a block of queries, unless one chunk of them has more."""


@dataclass(frozen=True)
class QueryBlock:
    """Consecutive chunks of queries, and the chunks of the sequence up to their last one.

    slots:  of the grid of the queries.
    tokens: of the tensor of the queries.
    slot, place: [t] of each token; its slot, and its place in the chunk.
    id, first:   [t, 1] its chunk, and the first chunk of its document.
    end:    chunks of the sequence that any of them may select.
    """

    slots: range
    tokens: slice
    slot: torch.Tensor
    place: torch.Tensor
    id: torch.Tensor
    first: torch.Tensor
    end: int

    @property
    def earlier(self) -> torch.Tensor:
        """Chunks that each token may select besides its own, bool [t, end]."""
        chunk = torch.arange(self.end, device=self.id.device)
        return (chunk >= self.first) & (chunk < self.id)


def query_blocks(chunks: ChunkGrid, device: torch.device, tokens: int) -> Iterator[QueryBlock]:
    """Yield blocks of about so many tokens, of one chunk at least."""
    ids, starts, lengths, firsts = chunks.on(device)
    step = max(tokens // max(chunks.longest, 1), 1)
    edges = [*chunks.starts.tolist(), chunks.tokens]
    for begin in range(0, len(chunks), step):
        end = min(begin + step, len(chunks))
        held = slice(edges[begin], edges[end])
        count = held.stop - held.start
        # output_size avoids a synchronisation with the GPU.
        slot = torch.arange(begin, end, device=device).repeat_interleave(lengths[begin:end], output_size=count)
        yield QueryBlock(
            slots=range(begin, end),
            tokens=held,
            slot=slot,
            place=torch.arange(held.start, held.stop, device=device) - starts[slot],
            id=ids[slot].unsqueeze(-1),
            first=firsts[slot].unsqueeze(-1),
            end=int(chunks.ids[begin:end].max()) + 1,
        )


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
        summaries: [B, n, Hkv, ...] of the whole sequence, by chunk id.
        masks: zeros, in the backend's form.
        mark: enters into them what a block of queries selected, bool [B, Hkv, t, chunks up to the block's end].
    """
    assert spec.selection is not None
    batch, seq_len, query_heads, _ = q.shape
    n, kv_heads = summaries.shape[1:3]
    width = list_width(spec.selection, n)
    lists = torch.full((batch, seq_len, kv_heads, width), n, dtype=torch.int32, device=q.device)
    selected = torch.empty(batch, seq_len, kv_heads, dtype=torch.int32, device=q.device)
    for block in query_blocks(chunks, q.device, MAX_SCORES // max(batch * query_heads * n, 1)):
        rows = q[:, block.tokens].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, t, D]
        scores = chunk_probabilities(rows.to(accumulation_dtype(q.dtype)), summaries, block, spec)
        hits = largest(scores, spec.selection.count - 1)
        mark(masks, block, hits)
        ids = torch.where(hits, torch.arange(block.end, device=q.device), n)
        filled = min(width, block.end)
        lists[:, block.tokens, :, :filled] = ids.topk(filled, largest=False).values.transpose(1, 2).to(torch.int32)
        selected[:, block.tokens] = (hits.sum(-1) + 1).to(torch.int32).transpose(1, 2)
    empty = summaries.new_empty(0)
    return Routing(empty, empty, selected, masks, lists)


def list_width(selection: Selection, n: int) -> int:
    """Entries of a token's list in a sequence of n chunks."""
    return min(selection.count - 1, n)


def chunk_probabilities(
    q: torch.Tensor, summaries: torch.Tensor, block: QueryBlock, spec: AttentionSpec
) -> torch.Tensor:
    """Mean over a group's heads of the softmax of q . s over earlier chunks, -inf elsewhere, [B, Hkv, t, end].

    A chunk whose scores are NaN is left out.
    """
    z = torch.einsum("bhgtd,bjhd->bhgtj", q * spec.routing_logit_scale, summaries[:, : block.end])
    allowed = block.earlier & ~z.isnan().any(2)
    p = torch.softmax(z.masked_fill_(~allowed.unsqueeze(2), -torch.inf), dim=-1).mean(2)
    return p.masked_fill_(~allowed, -torch.inf)  # rows with nothing allowed were NaN


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` largest scores above -inf of each row [..., n]; of equal ones the first."""
    possible = scores > -torch.inf
    if count >= scores.shape[-1]:
        return possible
    last = scores.topk(count, dim=-1).values[..., -1:]
    above, equal = scores > last, scores == last
    room = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & possible


def listed_chunks(lists: torch.Tensor, n: int) -> torch.Tensor:
    """Lists [..., k] as marks, bool [..., n]."""
    marks = torch.zeros(*lists.shape[:-1], n + 1, dtype=torch.bool, device=lists.device)
    return marks.scatter_(-1, lists.long(), True)[..., :n]


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

"""Blocks of queries that select chunks together, so that memory holds the scores of one block at a time.

Knows positions of chunks; does not know scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dash_kernels.chunks import ChunkGrid


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
    def chunk(self) -> torch.Tensor:
        """Ids of the chunks of the sequence, [end]."""
        return torch.arange(self.end, device=self.id.device)

    @property
    def earlier(self) -> torch.Tensor:
        """Chunks that each token may select besides its own, bool [t, end]."""
        return (self.chunk >= self.first) & (self.chunk < self.id)


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

"""Positions of the chunks in a tensor: a whole sequence, documents packed into one, or some chunks of a sequence.

Knows token offsets and chunk ids; does not know the attention, nor that ranks exist.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


class ChunkGrid:
    """Chunks of a tensor, one entry ("slot") per chunk, in the tensor's order.

    A query in a chunk with (id, first) may be routed to the chunks first <= j < id, and attends causally to its own.

    Immutable, so that calls share grids. A grid keeps its copies on devices.

    Attributes:
        ids: CPU int32 [slots], the chunk's id in the whole sequence.
        starts: CPU int32 [slots], offset of its first token in the tensor, ascending. Slots of queries are contiguous.
            A tensor of keys may hold tokens of other chunks between them.
        lengths: CPU int32 [slots], its tokens, 1 to chunk_size. Only the last chunk of a document may be incomplete,
            and no query is routed to that one.
        firsts: CPU int32 [slots], id of the first chunk of its document.
        documents: CPU int32 [slots], tokens of its document; None in grids of keys that were put together.
        tokens: number of tokens of the tensor.
        longest: tokens of the longest chunk.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        firsts: torch.Tensor,
        documents: torch.Tensor | None = None,
    ):
        self.ids = ids.to(torch.int32)
        self.lengths = lengths.to(torch.int32)
        self.firsts = firsts.to(torch.int32)
        self.documents = None if documents is None else documents.to(torch.int32)
        self.starts = (lengths.cumsum(0) - lengths).to(torch.int32)
        self.tokens = int(lengths.sum())
        self.longest = int(lengths.max()) if len(lengths) else 0
        self._complete_to: dict[int, bool] = {}
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._slots_by_id: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._starts_by_id: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def complete_to(self, chunk_size: int) -> bool:
        """True if every chunk has chunk_size tokens."""
        if chunk_size not in self._complete_to:
            self._complete_to[chunk_size] = bool((self.lengths == chunk_size).all())
        return self._complete_to[chunk_size]

    def on(self, device: torch.device) -> torch.Tensor:
        """Rows ids, starts, lengths, firsts: int32 [4, slots] on a device, uploaded once."""
        if device not in self._on_device:
            rows = torch.stack((self.ids, self.starts, self.lengths, self.firsts))
            self._on_device[device] = rows.to(device)
        return self._on_device[device]

    def slots_by_id(self, count: int, device: torch.device) -> torch.Tensor:
        """Slot of each chunk id, -1 if not in this tensor: int32 [count] on a device, uploaded once.

        count is the number of chunks of the whole sequence.
        """
        key = count, device
        if key not in self._slots_by_id:
            slots = torch.full((count,), -1, dtype=torch.int32)
            slots[self.ids.long()] = torch.arange(len(self), dtype=torch.int32)
            self._slots_by_id[key] = slots.to(device)
        return self._slots_by_id[key]

    def starts_by_id(self, count: int, device: torch.device) -> torch.Tensor:
        """First token of each chunk id, -1 if not in this tensor: int32 [count] on a device, uploaded once."""
        key = count, device
        if key not in self._starts_by_id:
            starts = torch.full((count,), -1, dtype=torch.int32)
            starts[self.ids.long()] = self.starts
            self._starts_by_id[key] = starts.to(device)
        return self._starts_by_id[key]

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def whole_sequence(seq_len: int, chunk_size: int) -> ChunkGrid:
        """Chunks of a sequence of one document."""
        return ChunkGrid.packed((0, seq_len), chunk_size)

    @classmethod
    def packed(cls, cu_seqlens: Sequence[int], chunk_size: int) -> ChunkGrid:
        """Chunks of packed documents: document i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1.

        cu_seqlens starts at 0 and never decreases. Chunks restart at every document; chunk ids count over all of them.
        An empty document has no chunk.
        """
        sizes = torch.tensor(cu_seqlens, dtype=torch.int64).diff()
        chunks = (sizes + chunk_size - 1) // chunk_size  # per document
        firsts = (chunks.cumsum(0) - chunks).repeat_interleave(chunks)
        ids = torch.arange(len(firsts))
        left = sizes.repeat_interleave(chunks) - (ids - firsts) * chunk_size  # tokens from the chunk's first on
        return cls(ids, left.clamp(max=chunk_size), firsts, sizes.repeat_interleave(chunks))

    def take(self, slots: Sequence[int]) -> ChunkGrid:
        """Grid of a tensor with only the chunks at these slots, in this order."""
        chosen = torch.tensor(slots, dtype=torch.int64)
        documents = None if self.documents is None else self.documents[chosen]
        return ChunkGrid(self.ids[chosen], self.lengths[chosen], self.firsts[chosen], documents)

    def without(self, begin: int, end: int) -> ChunkGrid:
        """Grid of the same tensor of keys without the chunks at slots begin to end - 1."""
        return self.keep(torch.cat((torch.arange(begin), torch.arange(end, len(self)))))

    def keep(self, slots: torch.Tensor) -> ChunkGrid:
        """Grid of the same tensor of keys with only the chunks at these slots, ascending."""
        grid = ChunkGrid(self.ids[slots], self.lengths[slots], self.firsts[slots])
        grid.starts, grid.tokens = self.starts[slots], self.tokens
        return grid

    @classmethod
    def complete(cls, ids: Sequence[int], chunk_size: int) -> ChunkGrid:
        """Complete chunks of a sequence of one document, in any order."""
        chosen = torch.tensor(ids, dtype=torch.int64)
        return cls(chosen, torch.full_like(chosen, chunk_size), torch.zeros_like(chosen))

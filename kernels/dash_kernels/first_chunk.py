"""Stages of queries that attend to the first chunk of their document, as they do to their own chunk.

The first chunk is no candidate of routing then. The stages of a backend take a part of K and V in two passes: the first
chunks in it, from lists of one chunk, and the others with the routing. Knows positions of chunks and the stages' order;
does not know how a backend computes them, nor that ranks exist.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dash_kernels.chunks import ChunkGrid
from dash_kernels.ranges import named_range
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries, QueryGradient, Routing

if TYPE_CHECKING:
    from dash_kernels.backend import Backend


class FirstChunkStages:
    """The stages of a backend, with the first chunk of a document among those that each of its queries attends to."""

    def __init__(self, stages: Backend) -> None:
        self._stages = stages
        self.summarize, self.mark_one, self.row_dots = stages.summarize, stages.mark_one, stages.row_dots

    def route(self, q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec) -> Routing:
        """Route to the chunks between the first and the own one; `selected` counts all."""
        routing = self._stages.route(q, after_first_chunks(query_chunks), summaries, spec)
        return dataclasses.replace(routing, selected=routing.selected + _later(query_chunks, q.device)[:, None])

    def reached(self, routing: Routing, query_chunks: ChunkGrid, n: int, spec: AttentionSpec) -> torch.Tensor:
        """Mark the earlier chunks that any query selected, the first ones included: bool [B, Hkv, n]."""
        reached = self._stages.reached(routing, after_first_chunks(query_chunks), n, spec)
        ids, _, _, firsts = query_chunks.on(reached.device)
        asked = torch.zeros(n, dtype=torch.int32, device=reached.device)
        return reached | (asked.index_add_(0, firsts, (ids > firsts).to(torch.int32)) > 0)

    def attend(
        self,
        queries: Queries,
        part: Part | Blocks,
        spec: AttentionSpec,
        *,
        before: tuple[torch.Tensor, torch.Tensor] | None,
        last: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, rest = self._passes(queries, part, spec)
        if first is not None:
            before = self._stages.attend(first.queries, first.part, spec, before=before, last=False)
        return self._stages.attend(_routed(queries), rest, spec, before=before, last=last)

    def query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> QueryGradient:
        before, rest = self._begin_query_gradient(queries, upstream, part, spec, before)
        return self._stages.query_gradient(_routed(queries), upstream, rest, spec, before)

    def finish_query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before, rest = self._begin_query_gradient(queries, upstream, part, spec, before)
        return self._stages.finish_query_gradient(_routed(queries), upstream, rest, spec, before)

    def _begin_query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> tuple[QueryGradient | None, Part | Blocks]:
        """Add the first chunks in a part; return the sum, and what the other pass takes."""
        first, rest = self._passes(queries, part, spec)
        if first is not None:
            before = self._stages.query_gradient(first.queries, upstream, first.part, spec, before)
        return before, rest

    def key_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        ratio: torch.Tensor,
        part: Part | Blocks,
        summary_query: torch.Tensor,
        spec: AttentionSpec,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, rest = self._passes(queries, part, spec)
        dkv, dsummary_query = self._stages.key_gradient(_routed(queries), upstream, ratio, rest, summary_query, spec)
        if first is not None:
            of_first, _ = self._stages.key_gradient(first.queries, upstream, ratio, first.part, summary_query, spec)
            with named_range("first chunks"):
                # The other pass leaves zeros there. Places of what a part lacks are given more than once, with zeros.
                dkv.index_add_(first.axis, first.places, of_first)
        return dkv, dsummary_query

    def _passes(
        self, queries: Queries, part: Part | Blocks, spec: AttentionSpec
    ) -> tuple[_FirstPass | None, Part | Blocks]:
        """Return the pass over the first chunks in a part, if there are any, and what the other pass takes."""
        documents = _documents(queries.chunks)
        with named_range("first chunks"):
            if isinstance(part, Blocks):
                if len(part.addresses) == 0:
                    return None, part
                blocks, places = documents.in_blocks(part, queries.summaries.shape)
                return _FirstPass(self._numbered(queries, documents, spec), blocks, axis=0, places=places), part
            split = documents.in_part(part.chunks)
            rest = Part(part.k, part.v, split.rest)
            if len(split.first) == 0:
                return None, rest
            places = split.places(part.k.device)
            first = Part(part.k[:, places], part.v[:, places], split.first)
            return _FirstPass(self._numbered(queries, documents, spec), first, axis=2, places=places), rest

    def _numbered(self, queries: Queries, documents: _Documents, spec: AttentionSpec) -> Queries:
        """Queries that select the first chunk of their document, without a bias, by the numbers of `_Documents`."""
        chunks, n = documents.queries, documents.numbers
        batch, _, heads, width = queries.summaries.shape
        ids, _, _, firsts = chunks.on(queries.q.device)
        chosen = torch.where(ids > firsts, firsts, n)
        lists = _per_token(chunks, chosen)[None, :, None, None].repeat(batch, 1, heads, 1)
        selected = (lists.squeeze(-1) < n).to(torch.int32) + 1
        summaries = queries.summaries.new_zeros(batch, n, heads, width)  # not read
        masks = self._stages.mark_one(queries.q, chunks, chosen, summaries, spec)
        empty = summaries.new_empty(0)
        return Queries(queries.q, chunks, summaries, Routing(empty, empty, selected, masks, lists))


def after_first_chunks(chunks: ChunkGrid) -> ChunkGrid:
    """Grid of queries that may be routed to every earlier chunk but the first one of their document."""
    return _documents(chunks).after_firsts


def _routed(queries: Queries) -> Queries:
    """Queries of the pass that knows nothing of first chunks."""
    routing, chunks = queries.routing, queries.chunks
    selected = routing.selected - _later(chunks, routing.selected.device)[:, None]
    return dataclasses.replace(
        queries, chunks=after_first_chunks(chunks), routing=dataclasses.replace(routing, selected=selected)
    )


def _later(chunks: ChunkGrid, device: torch.device) -> torch.Tensor:
    """1 for tokens after the first chunk of their document, 0 in it: int32 [T]."""
    ids, _, _, firsts = chunks.on(device)
    return _per_token(chunks, (ids > firsts).to(torch.int32))


def _per_token(chunks: ChunkGrid, of_slots: torch.Tensor) -> torch.Tensor:
    """Values of the slots of queries, repeated for their tokens: [T] on the same device."""
    # output_size avoids a synchronisation with the GPU.
    return of_slots.repeat_interleave(chunks.on(of_slots.device)[2], output_size=chunks.tokens)


@dataclass(frozen=True)
class _FirstPass:
    """Queries and the first chunks of their documents.

    places: int64, where those chunks are in the gradient of the part: blocks along axis 0, or tokens along axis 2.
    """

    queries: Queries
    part: Part | Blocks
    axis: int
    places: torch.Tensor


@dataclass(frozen=True)
class _SplitGrid:
    """Chunks of a part.

    first:  the first ones of the queries' documents, by their numbers, in a tensor of their own.
    rest:   those that are first in no document, in their places.
    starts: of the first ones in the part.
    """

    first: ChunkGrid
    rest: ChunkGrid
    starts: torch.Tensor
    _places: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def places(self, device: torch.device) -> torch.Tensor:
        """Tokens of the first chunks in the part, int64 in the order of `first`, made once."""
        if device not in self._places:
            moved = (self.starts - self.first.starts).repeat_interleave(self.first.lengths)
            self._places[device] = (moved + torch.arange(self.first.tokens)).to(device)
        return self._places[device]


class _Documents:
    """The documents of queries, and numbers for their chunks that do not grow with the sequence.

    Of document i the first chunk has the number 2 i and all others 2 i + 1. The numbers from 2 x documents on are of no
    query: they stand for blocks that a part lacks.

    Attributes:
        after_firsts: the grid for routing.
        queries: the grid by numbers.
        numbers: how many there are.
    """

    def __init__(self, chunks: ChunkGrid) -> None:
        later = chunks.ids > chunks.firsts
        self.after_firsts = ChunkGrid(chunks.ids, chunks.lengths, chunks.firsts + later, chunks.documents)
        self._firsts = chunks.firsts.unique()
        numbers = 2 * torch.searchsorted(self._firsts, chunks.firsts)
        self.queries = ChunkGrid(numbers + later, chunks.lengths, numbers)
        self._firsts_on_device: dict[torch.device, torch.Tensor] = {}
        self.numbers = 3 * len(self._firsts)
        self._splits: weakref.WeakKeyDictionary[ChunkGrid, _SplitGrid] = weakref.WeakKeyDictionary()

    def in_part(self, keys: ChunkGrid) -> _SplitGrid:
        """Split the chunks of a part, once."""
        if keys not in self._splits:
            is_first = keys.ids == keys.firsts
            slots = (is_first & torch.isin(keys.firsts, self._firsts)).nonzero().flatten()
            numbers = 2 * torch.searchsorted(self._firsts, keys.firsts[slots])
            self._splits[keys] = _SplitGrid(
                first=ChunkGrid(numbers, keys.lengths[slots], numbers),
                rest=keys.keep((~is_first).nonzero().flatten()),
                starts=keys.starts[slots],
            )
        return self._splits[keys]

    def in_blocks(self, blocks: Blocks, of_summaries: torch.Size) -> tuple[Blocks, torch.Tensor]:
        """Take a block of every first chunk and KV head; which of them the part lacks is known on the device alone.

        Args:
            of_summaries: [B, n, Hkv, D], the shape of the whole sequence's summaries.

        Returns:
            The blocks by numbers, any block in the place of one that is lacking; and their places, int64.
        """
        batch, n, heads, _ = of_summaries
        device = blocks.addresses.device
        if device not in self._firsts_on_device:
            self._firsts_on_device[device] = self._firsts.to(device, torch.int64)
        firsts = self._firsts_on_device[device]
        row = torch.arange(batch * heads, device=device)[:, None]
        place = torch.full((batch * heads * n,), -1, dtype=torch.int64, device=device)
        place[blocks.addresses] = torch.arange(len(blocks.addresses), device=device)
        found = place[row * n + firsts]  # [B x Hkv, documents]
        document = torch.arange(len(firsts), device=device)
        number = torch.where(found >= 0, 2 * document, 2 * len(firsts) + document)
        places = found.clamp(min=0).flatten()
        return Blocks(blocks.kv[places], (row * self.numbers + number).flatten()), places


_DOCUMENTS: weakref.WeakKeyDictionary[ChunkGrid, _Documents] = weakref.WeakKeyDictionary()


def _documents(chunks: ChunkGrid) -> _Documents:
    """Return the documents of a grid of queries, made once and kept as long as the grid."""
    if chunks not in _DOCUMENTS:
        _DOCUMENTS[chunks] = _Documents(chunks)
    return _DOCUMENTS[chunks]

"""Stages of queries that attend to the first chunk of their document, as they do to their own chunk.

The first chunk is no candidate of routing then. The stages of a backend take it as a part of its own, from lists of one
chunk, and the rest of the sequence with their routing. Knows positions of chunks and the stages' order; does not know
how a backend computes them, nor that ranks exist.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries, QueryGradient, Routing

if TYPE_CHECKING:
    from dash_kernels.backend import Backend


@functools.lru_cache(maxsize=64)
def after_first_chunks(chunks: ChunkGrid) -> ChunkGrid:
    """Grid of queries that may be routed to every earlier chunk but the first one of their document."""
    firsts = torch.where(chunks.ids > chunks.firsts, chunks.firsts + 1, chunks.firsts)
    return ChunkGrid(chunks.ids, chunks.lengths, firsts, chunks.documents)


class FirstChunkStages:
    """The stages of a backend, with the first chunk of a document among those that each of its queries attends to."""

    def __init__(self, stages: Backend) -> None:
        self._stages = stages
        self.summarize, self.mark_one, self.row_dots = stages.summarize, stages.mark_one, stages.row_dots

    def route(self, q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec) -> Routing:
        """Route to the chunks between the first and the own one; `selected` counts all."""
        routing = self._stages.route(q, after_first_chunks(query_chunks), summaries, spec)
        ids, _, _, firsts = query_chunks.on(q.device)
        later = _per_token(query_chunks, (ids > firsts).to(torch.int32))
        return dataclasses.replace(routing, selected=routing.selected + later[:, None])

    def reached(self, routing: Routing, query_chunks: ChunkGrid, n: int, spec: AttentionSpec) -> torch.Tensor:
        """Mark the earlier chunks that any query selected, the first ones included: bool [B, Hkv, n]."""
        reached = self._stages.reached(routing, after_first_chunks(query_chunks), n, spec).clone()
        firsts = query_chunks.firsts[query_chunks.ids > query_chunks.firsts].unique()
        reached[:, :, firsts.to(reached.device).long()] = True
        return reached

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
        first, rest = self._passes(queries, part, spec)
        if first is not None:
            before = self._stages.query_gradient(first.queries, upstream, first.part, spec, before)
        return self._stages.query_gradient(_routed(queries), upstream, rest, spec, before)

    def finish_query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, rest = self._passes(queries, part, spec)
        if first is not None:
            before = self._stages.query_gradient(first.queries, upstream, first.part, spec, before)
        return self._stages.finish_query_gradient(_routed(queries), upstream, rest, spec, before)

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
            if first.tokens is None:
                dkv += of_first
            else:
                dkv[:, :, first.tokens] = of_first
        return dkv, dsummary_query

    def _passes(
        self, queries: Queries, part: Part | Blocks, spec: AttentionSpec
    ) -> tuple[_FirstPass | None, Part | Blocks]:
        """Return the pass over the first chunks in a part, if there are any, and the part for the other pass.

        Of `Blocks` both passes take all: lists and routing choose, and no block is a query's own chunk.
        """
        if isinstance(part, Blocks):
            n = queries.summaries.shape[1]
            return _FirstPass(self._to_first_chunks(queries, queries.chunks, n, spec), part, None), part
        split = _split(queries.chunks, part.chunks)
        rest = Part(part.k, part.v, split.rest)
        if len(split.keys) == 0:
            return None, rest
        tokens = split.on(part.k.device)
        first = Part(part.k[:, tokens], part.v[:, tokens], split.keys)
        return _FirstPass(self._to_first_chunks(queries, split.queries, split.n, spec), first, tokens), rest

    def _to_first_chunks(self, queries: Queries, chunks: ChunkGrid, n: int, spec: AttentionSpec) -> Queries:
        """Queries that select the first chunk of their document, without a bias; chunks: theirs, numbered up to n."""
        batch, _, heads, width = queries.summaries.shape
        ids, _, _, firsts = chunks.on(queries.q.device)
        chosen = torch.where(ids > firsts, firsts, n)
        lists = _per_token(chunks, chosen)[None, :, None, None].repeat(batch, 1, heads, 1)
        summaries = queries.summaries.new_zeros(batch, n, heads, width)  # not read
        masks = self._stages.mark_one(queries.q, chunks, chosen, summaries, spec)
        empty = summaries.new_empty(0)
        return Queries(queries.q, chunks, summaries, Routing(empty, empty, lists.new_empty(0), masks, lists))


def _routed(queries: Queries) -> Queries:
    return dataclasses.replace(queries, chunks=after_first_chunks(queries.chunks))


def _per_token(chunks: ChunkGrid, of_slots: torch.Tensor) -> torch.Tensor:
    """Values of the slots of queries, repeated for their tokens: [T] on the same device."""
    # output_size avoids a synchronisation with the GPU.
    return of_slots.repeat_interleave(chunks.on(of_slots.device)[2], output_size=chunks.tokens)


@dataclass(frozen=True)
class _FirstPass:
    """Queries and the first chunks of their documents; tokens: where these are in the part, None for `Blocks`."""

    queries: Queries
    part: Part | Blocks
    tokens: torch.Tensor | None


class _Split:
    """Grids for the first chunks of documents in a part, and for the rest of it.

    Of the queries' documents, the first chunk has an even number and the others share the next one, so that lists and
    bits do not grow with the sequence.

    Attributes:
        queries: of the queries, so numbered.
        keys: of the first chunks of these documents, so numbered, in a tensor of their own.
        n: numbers.
        rest: of the other chunks, in their places and with their ids.
    """

    def __init__(self, queries: ChunkGrid, keys: ChunkGrid) -> None:
        documents = queries.firsts.unique()
        self.n = 2 * len(documents)
        numbers = 2 * torch.searchsorted(documents, queries.firsts)
        self.queries = ChunkGrid(numbers + (queries.ids > queries.firsts), queries.lengths, numbers)
        is_first = keys.ids == keys.firsts
        slots = (is_first & torch.isin(keys.firsts, documents)).nonzero().flatten()
        numbers = 2 * torch.searchsorted(documents, keys.firsts[slots])
        self.keys = ChunkGrid(numbers, keys.lengths[slots], numbers)
        self.rest = keys.keep((~is_first).nonzero().flatten())
        # Distance from a token's place among the first chunks to that in the part.
        moved = keys.starts[slots].long() - self.keys.starts
        self._tokens = torch.arange(self.keys.tokens) + moved.repeat_interleave(self.keys.lengths)
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """Return where the tokens of the first chunks are in the part, int64, uploaded once."""
        if device not in self._on_device:
            self._on_device[device] = self._tokens.to(device)
        return self._on_device[device]


@functools.lru_cache(maxsize=256)
def _split(queries: ChunkGrid, keys: ChunkGrid) -> _Split:
    return _Split(queries, keys)

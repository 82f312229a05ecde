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
        split = _SplitPart.of(part)
        if split.first is not None:
            to_first = self._to_first_chunks(queries, spec)
            before = self._stages.attend(to_first, split.first, spec, before=before, last=False)
        return self._stages.attend(_routed(queries), split.rest, spec, before=before, last=last)

    def query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> QueryGradient:
        split = _SplitPart.of(part)
        before = self._gradient_of_first_chunks(queries, upstream, split, spec, before)
        return self._stages.query_gradient(_routed(queries), upstream, split.rest, spec, before)

    def finish_query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        split = _SplitPart.of(part)
        before = self._gradient_of_first_chunks(queries, upstream, split, spec, before)
        return self._stages.finish_query_gradient(_routed(queries), upstream, split.rest, spec, before)

    def key_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        ratio: torch.Tensor,
        part: Part | Blocks,
        summary_query: torch.Tensor,
        spec: AttentionSpec,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        split = _SplitPart.of(part)
        dkv, dsummary_query = self._stages.key_gradient(
            _routed(queries), upstream, ratio, split.rest, summary_query, spec
        )
        if split.first is not None:
            to_first = self._to_first_chunks(queries, spec)
            of_first, _ = self._stages.key_gradient(to_first, upstream, ratio, split.first, summary_query, spec)
            if split.tokens is None:
                dkv += of_first
            else:
                dkv[:, :, split.tokens] = of_first
        return dkv, dsummary_query

    def _gradient_of_first_chunks(
        self,
        queries: Queries,
        upstream: OutputGradient,
        split: _SplitPart,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> QueryGradient | None:
        if split.first is None:
            return before
        return self._stages.query_gradient(self._to_first_chunks(queries, spec), upstream, split.first, spec, before)

    def _to_first_chunks(self, queries: Queries, spec: AttentionSpec) -> Queries:
        """Queries that select the first chunk of their document, without a bias."""
        chunks, summaries = queries.chunks, queries.summaries
        batch, n, heads, _ = summaries.shape
        ids, _, _, firsts = chunks.on(queries.q.device)
        chosen = torch.where(ids > firsts, firsts, n)
        lists = _per_token(chunks, chosen)[None, :, None, None].repeat(batch, 1, heads, 1)
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
class _SplitPart:
    """A part's first chunks of documents, and the rest of it.

    first:  None where the part has none. Of `Blocks` both are all of them: lists choose, and none is a query's own.
    tokens: int64 on the device of the part, where the first chunks are in it; None for `Blocks`.
    """

    first: Part | Blocks | None
    rest: Part | Blocks
    tokens: torch.Tensor | None

    @classmethod
    def of(cls, part: Part | Blocks) -> _SplitPart:
        if isinstance(part, Blocks):
            return cls(part, part, None)
        split = _split(part.chunks)
        if len(split.first) == 0:
            return cls(None, part, None)
        tokens = split.on(part.k.device)
        first = Part(part.k[:, tokens], part.v[:, tokens], split.first)
        return cls(first, Part(part.k, part.v, split.rest), tokens)


class _SplitGrid:
    """Grids of the first chunks of documents in a tensor of their own, and of the other chunks where they are."""

    def __init__(self, chunks: ChunkGrid) -> None:
        is_first = chunks.ids == chunks.firsts
        slots = is_first.nonzero().flatten()
        self.first = chunks.take(slots.tolist())
        self.rest = chunks.keep((~is_first).nonzero().flatten())
        lengths = self.first.lengths.long()
        # Distance from a token's place among the first chunks to that in the part.
        moved = (chunks.starts[slots] - self.first.starts).long()
        self._tokens = torch.arange(self.first.tokens) + moved.repeat_interleave(lengths)
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """Return where the tokens of the first chunks are in the part, uploaded once."""
        if device not in self._on_device:
            self._on_device[device] = self._tokens.to(device)
        return self._on_device[device]


@functools.lru_cache(maxsize=64)
def _split(chunks: ChunkGrid) -> _SplitGrid:
    return _SplitGrid(chunks)

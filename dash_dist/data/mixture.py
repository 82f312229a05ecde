"""The documents of all sources in one order, with their shares of the tokens.

Knows lengths and numbers of documents; does not read tokens. Everything here is the same at every rank, and a position
is one number and one epoch for each source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from dash_dist.config.data import DataConfig
from dash_dist.data.corpus import Corpus, TokenSource
from dash_dist.data.order import DocumentOrder, groups_of
from dash_dist.data.parts import LEAST_TOKENS, Part, Parts

_BLOCK = 1024


@dataclass(eq=False)
class Waiting:
    """A document, or a part of one, that is not used up.

    Attributes:
        length: tokens of the document up to its end or that of the part, the end-of-document token included.
        offset: tokens of the document that are in earlier sequences or parts.
    """

    source: int
    document: int
    length: int
    offset: int = 0


class SourceCursor:
    """The documents of one source without end, each once in every epoch unless it has another weight.

    The parts of a long document come independently of each other, as documents do.

    Args:
        longest: tokens of the longest document or part that is read; None is any.
        weights: `data.length_weights`.
        cut: `data.cut_documents`.

    Attributes:
        parts: of all documents.
        epoch, place: of the next document or part.
        drawn: tokens of the documents and parts so far.
        skipped: documents passed over since they have no text or are damaged, again in each epoch.
        dropped: documents and parts passed over since they are longer than `longest`, again in each epoch.
    """

    def __init__(
        self,
        source: TokenSource,
        seed: int | None,
        *,
        longest: int | None,
        weights: Mapping[int, float] = MappingProxyType({}),
        cut: int | None = None,
    ) -> None:
        self.parts = Parts(source.lengths, cut)
        self._order = DocumentOrder(self.parts, seed, weights)
        self._longest = longest
        self.epoch = self.place = self.drawn = self.skipped = self.dropped = 0
        self._block: tuple[int, int, np.ndarray] | None = None
        if not (source.lengths >= LEAST_TOKENS).any():
            raise ValueError(f"{source.record.description} has no document of at least {LEAST_TOKENS} tokens")
        if longest is not None and self.parts.shortest() > longest:
            raise ValueError(
                f"{source.record.description} has no document that fits into a sequence, and data.long_documents "
                "is drop: set it to split, or training.sequence_length higher"
            )

    def draw(self) -> Part:
        """Return the next document or part."""
        while True:
            part = self._next()
            length = part.stop - part.start
            if length < LEAST_TOKENS:
                self.skipped += 1
            elif self._longest is not None and length > self._longest:
                self.dropped += 1
            else:
                self.drawn += length
                return part

    def _next(self) -> Part:
        while self.place >= (places := self._order.places(self.epoch)):  # of small weights, none in some epochs
            self.epoch, self.place = self.epoch + 1, 0
        first = self.place - self.place % _BLOCK
        if self._block is None or self._block[:2] != (self.epoch, first):
            numbers = self._order.parts(self.epoch, first, min(first + _BLOCK, places))
            self._block = self.epoch, first, self.parts.bounds(numbers)
        _, _, bounds = self._block
        self.place += 1
        return Part(*bounds[self.place - 1 - first].tolist())

    @property
    def epochs(self) -> float:
        """Passes over the documents, the current one as a fraction of its places."""
        return self.epoch + self.place / max(1, self._order.places(self.epoch))

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {name: getattr(self, name) for name in ("epoch", "place", "drawn", "skipped", "dropped")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position."""
        for name in ("epoch", "place", "drawn", "skipped", "dropped"):
            setattr(self, name, int(state[name]))
        if not 0 <= self.place <= (places := self._order.places(self.epoch)):
            raise ValueError(f"place {self.place} is not one of {places} in epoch {self.epoch}")


def shares_of(config: DataConfig, corpus: Corpus) -> list[float]:
    """Return the share of each source in the tokens; they sum to 1."""
    sources = config.all_sources
    tokens = [
        _tokens_of_epoch(source, one.length_weights)
        for source, one in zip(corpus.sources.values(), sources, strict=True)
    ]
    if sources[0].weight is not None:
        amounts = [one.weight or 0.0 for one in sources]
    elif sources[0].epochs is not None:
        amounts = [(one.epochs or 0.0) * own for one, own in zip(sources, tokens, strict=True)]
    else:
        amounts = [own ** (1 / (config.temperature or 1.0)) for own in tokens]
    return [amount / sum(amounts) for amount in amounts]


def _tokens_of_epoch(source: TokenSource, weights: Mapping[int, float]) -> float:
    if not weights:
        return float(source.record.tokens)
    group, of_group = groups_of(source.lengths, weights)
    return float(np.bincount(group, source.lengths, len(of_group)) @ np.array(of_group))


class Mixture:
    """Documents of all sources in one order. The next one is of the source that lacks most of its share.

    So shares differ from those asked for by no more than a document of each source, at any time.
    """

    def __init__(self, cursors: list[SourceCursor], shares: list[float]) -> None:
        self.cursors = cursors
        self.shares = shares

    def next_document(self) -> Waiting:
        """Draw the next document, or part of one."""
        source = 0
        if len(self.cursors) > 1:
            total = sum(cursor.drawn for cursor in self.cursors) + 1
            lacking = [share * total - cursor.drawn for share, cursor in zip(self.shares, self.cursors, strict=True)]
            source = lacking.index(max(lacking))
        part = self.cursors[source].draw()
        return Waiting(source, part.document, part.stop, part.start)

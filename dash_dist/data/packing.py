"""Sequences of equal length from documents, joined or separate.

Knows numbers and lengths of documents; does not read tokens, so that every rank can plan the sequences of all.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dash_dist.data.mixture import Waiting


class Piece(NamedTuple):
    """Tokens start to stop of a document that are inputs of a sequence; their labels end one token later."""

    source: int
    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of T tokens.

    Attributes:
        tokens: int64 [T].
        labels: int64 [T], the token after each token.
        loss_mask: bool [T], where the label counts: nowhere at padding.
        cu_seqlens: int32 [documents + 1], where each document begins, and T; None where documents are joined.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray | None


Read = Callable[[Piece], tuple[np.ndarray, np.ndarray]]
"""Returns the tokens of a piece, int64 [stop - start], and which of them count in the loss as labels, bool."""


class Packer(ABC):
    """Plans sequences of `sequence_length` tokens, and fills those that a rank reads."""

    def __init__(self, next_document: Callable[[], Waiting], *, sequence_length: int) -> None:
        self._next_document = next_document
        self._length = sequence_length

    @abstractmethod
    def plan(self) -> list[Piece]:
        """Return the pieces of the next sequence."""

    @abstractmethod
    def fill(self, pieces: Sequence[Piece], read: Read) -> PackedSequence:
        """Read the tokens of a planned sequence."""

    @abstractmethod
    def labels(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces of documents that are labels in a planned sequence."""

    @property
    @abstractmethod
    def waiting(self) -> list[Waiting]:
        """Documents that are drawn and not used up, in the order of their arrival: the packer's position."""

    @abstractmethod
    def resume(self, waiting: list[Waiting]) -> None:
        """Continue with the documents that were `waiting`."""


class JoinedPacker(Packer):
    """Documents with their end-of-document tokens as one endless text, cut every T tokens.

    Every token but the very first is predicted exactly once, the first token of a document from the document before.
    The last label of a sequence is the first token of the next one: pieces hold T + 1 tokens.
    """

    _current: Waiting | None = None

    def plan(self) -> list[Piece]:
        pieces, missing = [], self._length + 1
        while missing:
            one = self._current = self._current or self._next_document()
            taken = min(one.length - one.offset, missing)
            pieces.append(Piece(one.source, one.document, one.offset, one.offset + taken))
            one.offset += taken
            missing -= taken
            if missing:
                self._current = None
        one.offset -= 1
        return pieces

    @property
    def waiting(self) -> list[Waiting]:
        return [] if self._current is None else [self._current]

    def resume(self, waiting: list[Waiting]) -> None:
        self._current = waiting[0] if waiting else None

    def fill(self, pieces: Sequence[Piece], read: Read) -> PackedSequence:
        tokens, counts = zip(*(read(piece) for piece in pieces), strict=True)
        window = np.concatenate(tokens)
        return PackedSequence(window[:-1], window[1:], np.concatenate(counts)[1:], cu_seqlens=None)

    def labels(self, pieces: Sequence[Piece]) -> list[Piece]:
        first, *rest = pieces
        return [first._replace(start=first.start + 1), *rest]


class SeparatePacker(Packer):
    """Whole documents, each padded to whole chunks, so that the chunks restart with it; no label crosses a border.

    A sequence begins with the document that has waited longest, and takes the longest that still fits. Where none does,
    a document longer than a sequence, which has to be cut anyway, fills the rest. Every token of a document is an
    input exactly once, and a label exactly once unless it is the first of a piece, which nothing precedes. The
    end-of-document token is a label only. What is left of a sequence is padding, a document of its own.

    Args:
        chunk_size: tokens of a chunk; `sequence_length` is a multiple of it.
        lookahead: documents that wait.
        buckets: ascending lengths; documents share a sequence only with those between the same two.
        end_of_document: the token of the padding.
    """

    def __init__(
        self,
        next_document: Callable[[], Waiting],
        *,
        sequence_length: int,
        chunk_size: int,
        lookahead: int,
        buckets: Sequence[int],
        end_of_document: int,
    ) -> None:
        super().__init__(next_document, sequence_length=sequence_length)
        self._chunk_size = chunk_size
        self._lookahead = lookahead
        self._buckets = buckets
        self._end_of_document = end_of_document
        self.resume([])

    @property
    def waiting(self) -> list[Waiting]:
        return list(self._waiting.values())

    def resume(self, waiting: list[Waiting]) -> None:
        self._waiting: dict[int, Waiting] = {}
        # Of each bucket (inputs, -arrival), ascending: of equally long documents the first to arrive is the last here.
        self._by_length: list[list[tuple[int, int]]] = [[] for _ in range(len(self._buckets) + 1)]
        self._arrivals = 0
        for one in waiting:
            self._add(one)

    def plan(self) -> list[Piece]:
        self._draw()
        arrival = next(iter(self._waiting))
        first, bucket = self._waiting[arrival], self._bucket(self._waiting[arrival])
        self._by_length[bucket].remove((_inputs(first), -arrival))
        pieces, left = [_take(first, self._length)], self._length
        if not _inputs(first):
            del self._waiting[arrival]
        while left := left - self._padded(pieces[-1].stop - pieces[-1].start):
            self._draw()
            fitting = bisect.bisect_right(self._by_length[bucket], (left, 0))
            if fitting:
                _, place = self._by_length[bucket].pop(fitting - 1)
                pieces.append(_take(self._waiting.pop(-place), left))
            elif self._by_length[bucket] and self._by_length[bucket][-1][0] > self._length:
                _, place = self._by_length[bucket].pop()  # it has to be cut somewhere
                pieces.append(_take(self._waiting[-place], left))
                self._insert(-place, self._waiting[-place])
            else:
                break
        if _inputs(first):
            self._insert(arrival, first)
        return pieces

    def _draw(self) -> None:
        while len(self._waiting) < self._lookahead:
            self._add(self._next_document())

    def _add(self, one: Waiting) -> None:
        self._waiting[self._arrivals] = one
        self._insert(self._arrivals, one)
        self._arrivals += 1

    def _insert(self, arrival: int, one: Waiting) -> None:
        bisect.insort(self._by_length[self._bucket(one)], (_inputs(one), -arrival))

    def _bucket(self, one: Waiting) -> int:
        return bisect.bisect_left(self._buckets, _inputs(one))

    def _padded(self, tokens: int) -> int:
        return -(-tokens // self._chunk_size) * self._chunk_size

    def fill(self, pieces: Sequence[Piece], read: Read) -> PackedSequence:
        tokens = np.full(self._length, self._end_of_document, dtype=np.int64)
        labels = np.full(self._length, self._end_of_document, dtype=np.int64)
        loss_mask = np.zeros(self._length, dtype=bool)
        borders = [0]
        for piece in pieces:
            start, taken = borders[-1], piece.stop - piece.start
            text, counts = read(piece._replace(stop=piece.stop + 1))
            tokens[start : start + taken] = text[:-1]
            labels[start : start + taken] = text[1:]
            loss_mask[start : start + taken] = counts[1:]
            borders.append(start + self._padded(taken))
        if borders[-1] < self._length:
            borders.append(self._length)
        return PackedSequence(tokens, labels, loss_mask, np.array(borders, dtype=np.int32))

    def labels(self, pieces: Sequence[Piece]) -> list[Piece]:
        return [piece._replace(start=piece.start + 1, stop=piece.stop + 1) for piece in pieces]


def _take(one: Waiting, left: int) -> Piece:
    taken = min(_inputs(one), left)
    one.offset += taken
    return Piece(one.source, one.document, one.offset - taken, one.offset)


def _inputs(one: Waiting) -> int:
    return one.length - 1 - one.offset


def count_inputs(pieces: Sequence[Piece], sequence_length: int) -> Mapping[int, int]:
    """Return the input tokens of a planned sequence by source."""
    counts: dict[int, int] = {}
    for piece in pieces:
        counts[piece.source] = counts.get(piece.source, 0) + piece.stop - piece.start
    if (over := sum(counts.values()) - sequence_length) > 0:  # the label behind the last input of joined documents
        counts[pieces[-1].source] -= over
    return counts

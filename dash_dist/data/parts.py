"""The parts of the documents of one source: whole documents, and the parts of long ones that are shuffled apart.

Knows lengths; does not know the order of the parts.
"""

from typing import NamedTuple

import numpy as np

LEAST_TOKENS = 2
"""Of a part that is read: one token to predict from, one to predict."""
_NO_CUT = int(np.iinfo(np.int32).max)  # no document is longer


class Part(NamedTuple):
    """Tokens start to stop of a document."""

    document: int
    start: int
    stop: int


class Parts:
    """The parts of all documents, numbered: the first part of each document by its document, then all further parts.

    A document longer than `cut` tokens has parts of `cut` tokens and a shorter last one. A single token that would be
    left over belongs to the part before. Memory follows the number of long documents, not of their parts.

    Args:
        lengths: int [documents], tokens of each.
        cut: `data.cut_documents`.
    """

    def __init__(self, lengths: np.ndarray, cut: int | None) -> None:
        self._lengths = lengths
        self._cut = _NO_CUT if cut is None else min(cut, _NO_CUT)
        self._long = np.flatnonzero(lengths >= self._cut + LEAST_TOKENS)
        # Of each long document, counted from 0; behind them the number of all.
        self._first_further = np.concatenate([[0], np.cumsum(self._last(self._long))])

    def __len__(self) -> int:
        return len(self._lengths) + int(self._first_further[-1])

    def bounds(self, numbers: np.ndarray) -> np.ndarray:
        """Return document, start and stop of parts, int64 [parts, 3]."""
        documents, place = numbers.astype(np.int64), np.zeros(len(numbers), dtype=np.int64)
        is_further = numbers >= len(self._lengths)
        further = numbers[is_further] - len(self._lengths)
        long = np.searchsorted(self._first_further, further, side="right") - 1
        documents[is_further] = self._long[long]
        place[is_further] = further - self._first_further[long] + 1
        starts = place * self._cut
        stops = np.where(place < self._last(documents), starts + self._cut, self._lengths[documents])
        return np.stack([documents, starts, stops], axis=1)

    def lengths_of_documents(self) -> np.ndarray:
        """Return the tokens of the whole document of each part, int [parts]."""
        return np.concatenate([self._lengths, np.repeat(self._lengths[self._long], np.diff(self._first_further))])

    def shortest(self) -> int:
        """Return the tokens of the shortest part that can be read, where a document can."""
        whole = self._lengths[(self._lengths >= LEAST_TOKENS) & (self._lengths < self._cut + LEAST_TOKENS)]
        last = self._lengths[self._long] - self._last(self._long) * self._cut
        return int(np.concatenate([whole, last, np.full(len(last), self._cut)]).min())

    def _last(self, documents: np.ndarray) -> np.ndarray:
        """Return the place of the last part in each document; that of the first is 0."""
        return np.maximum(self._lengths[documents].astype(np.int64) - LEAST_TOKENS, 0) // self._cut

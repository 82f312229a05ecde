"""The tokens of each document that count in the loss, as spans beside the tokens of a shard.

Knows numbers of documents and tokens; does not know why a token counts. A shard of texts has no such files: all its
tokens count.
"""

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dash_dist.data.token_files import REMEDY

_SPANS = "loss_spans.npy"  # int32 [n, 2]: first and last + 1 token in its document
_FIRST = "loss_first.npy"  # int64 [documents + 1]: number of each document's first span


class SpanWriter:
    """Spans of the documents of a shard, in their order.

    Attributes:
        tokens: tokens that count so far.
    """

    def __init__(self) -> None:
        self._spans: array[int] = array("i")
        self._first: array[int] = array("q", [0])
        self.tokens = 0

    def add(self, spans: Iterable[tuple[int, int]]) -> None:
        """Append the ascending spans of the next document; none if it has no tokens that count."""
        for start, stop in spans:
            self._spans.extend((start, stop))
            self.tokens += stop - start
        self._first.append(len(self._spans) // 2)

    def close(self, folder: Path) -> None:
        """Write the files."""
        np.save(folder / _SPANS, np.array(self._spans, dtype=np.int32).reshape(-1, 2))
        np.save(folder / _FIRST, np.array(self._first, dtype=np.int64))


class LossSpans:
    """Spans of the documents of a shard, mapped into memory.

    Raises ValueError if the files of `folder` are not whole or not of that many documents, OSError if they are missing.
    """

    def __init__(self, folder: Path, documents: int) -> None:
        try:
            self._spans = np.load(folder / _SPANS, mmap_mode="r")
            self._first = np.load(folder / _FIRST, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{folder}: the list of tokens that count is damaged: {error}; {REMEDY}") from error
        if len(self._first) != documents + 1 or self._first[-1] != len(self._spans):
            raise ValueError(
                f"{folder}: the list of tokens that count has {len(self._first) - 1} of {documents} documents, and "
                f"{len(self._spans)} of {self._first[-1:].tolist()} spans: {REMEDY}"
            )

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens start to stop of a document count, bool [stop - start]."""
        mask = np.zeros(stop - start, dtype=bool)
        for first, last in self._inside(document, start, stop):
            mask[first - start : last - start] = True
        return mask

    def count(self, document: int, start: int, stop: int) -> int:
        """Return how many of the tokens start to stop of a document count."""
        inside = self._inside(document, start, stop)
        return int((inside[:, 1] - inside[:, 0]).sum())

    def _inside(self, document: int, start: int, stop: int) -> np.ndarray:
        spans = self._spans[self._first[document] : self._first[document + 1]]
        touched = spans[(spans[:, 1] > start) & (spans[:, 0] < stop)]
        return np.clip(touched, start, stop)

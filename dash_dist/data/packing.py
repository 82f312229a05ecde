"""Cuts a row's documents into sequences of equal length, joined or separate.

Knows the tokens of one row. Does not know files, tokenizers or the batch.

A position holds the packer's own state, in addition to the documents' position. If `inside_document`, the next document
given is the one that was interrupted, else the one after. It is JSON-serialisable and holds no more than one token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of T tokens.

    Attributes:
        tokens: int64 [T].
        labels: int64 [T], the token after each token.
        loss_mask: bool [T], where the label counts: everywhere but at padding.
        cu_seqlens: int32 [documents + 1], where each document begins, and T; None where documents are joined.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray | None


class Packer(ABC):
    """Sequences of `sequence_length` tokens from documents that follow each other.

    The work is linear in the tokens: a sequence is filled by slices of the document's array, which is held once and
    never copied as a whole.

    Args:
        next_document: returns the next document's token ids, 1-d, any integer dtype, never empty.
        sequence_length: T.
        end_of_document: the token that follows the last one of each document.
    """

    _least_rest: int
    """Least number of remaining tokens of a document that continues in the next sequence."""

    def __init__(self, next_document: Callable[[], np.ndarray], *, sequence_length: int, end_of_document: int):
        self._next_document = next_document
        self._length = sequence_length
        self._end_of_document = end_of_document
        self._document: np.ndarray | None = None
        self._offset = 0  # tokens of the document that are in earlier sequences

    @property
    def inside_document(self) -> bool:
        """Return whether the last document of the last sequence continues in the next one."""
        return self._document is not None

    @abstractmethod
    def next_sequence(self) -> PackedSequence:
        """Raises ValueError if the document is shorter than the position resumed at: the corpus has changed."""

    def position(self) -> dict[str, Any]:
        """Behind the last sequence."""
        return {"offset": self._offset}

    def resume(self, position: Mapping[str, Any]) -> None:
        """Continue at a position."""
        self._document = None
        self._offset = position["offset"]

    def _current_document(self) -> np.ndarray:
        """The document that the offset counts in."""
        if self._document is None:
            self._document = self._next_document()
            if self._offset and self._offset > len(self._document) - self._least_rest:
                raise ValueError(
                    f"resumed at token {self._offset} of a document that now has {len(self._document)} tokens: "
                    "the corpus or the tokenizer has changed since the checkpoint; restore it or start a new run"
                )
        return self._document

    def _finish_document(self) -> None:
        self._document = None
        self._offset = 0


class JoinedPacker(Packer):
    """Documents and their end-of-document tokens as one endless text, cut every T tokens.

    Every token but the very first is predicted exactly once, the first token of a document from the document before.
    The last label of a sequence is the first token of the next one.
    """

    _least_rest = 0  # its end-of-document token may be all that is missing
    _last_token: int | None = None  # the next sequence begins with it; None before the first sequence

    def position(self) -> dict[str, Any]:
        return {**super().position(), "last_token": self._last_token}

    def resume(self, position: Mapping[str, Any]) -> None:
        super().resume(position)
        self._last_token = position["last_token"]

    def next_sequence(self) -> PackedSequence:
        window = np.empty(self._length + 1, dtype=np.int64)
        filled = 0
        if self._last_token is not None:
            window[0] = self._last_token
            filled = 1
        while filled < len(window):
            document = self._current_document()
            taken = min(len(document) - self._offset, len(window) - filled)
            window[filled : filled + taken] = document[self._offset : self._offset + taken]
            filled += taken
            self._offset += taken
            if self._offset == len(document) and filled < len(window):
                window[filled] = self._end_of_document
                filled += 1
                self._finish_document()
        self._last_token = int(window[-1])
        return PackedSequence(window[:-1], window[1:], np.ones(self._length, dtype=bool), cu_seqlens=None)


class SeparatePacker(Packer):
    """Each document padded to whole chunks, so that the chunks restart with it; no label crosses a border.

    Every token of a document is an input exactly once, and a label exactly once unless it is the document's first,
    which nothing precedes. The end-of-document token is a label only, of the document's last token. A document that
    does not fit into the rest of a sequence fills it and continues in the next one as a document of its own: padding is
    at the end of documents only, less than a chunk for each. Padding counts to the document that it follows.

    Args:
        chunk_size: tokens of a chunk; `sequence_length` is a multiple of it.
    """

    _least_rest = 1

    def __init__(
        self,
        next_document: Callable[[], np.ndarray],
        *,
        sequence_length: int,
        end_of_document: int,
        chunk_size: int,
    ):
        super().__init__(next_document, sequence_length=sequence_length, end_of_document=end_of_document)
        self._chunk_size = chunk_size

    def next_sequence(self) -> PackedSequence:
        # What is not overwritten is padding: any token of the vocabulary will do.
        tokens = np.full(self._length, self._end_of_document, dtype=np.int64)
        labels = np.full(self._length, self._end_of_document, dtype=np.int64)
        loss_mask = np.zeros(self._length, dtype=bool)
        borders = [0]
        while (start := borders[-1]) < self._length:
            document = self._current_document()
            rest = document[self._offset :]
            taken = min(len(rest), self._length - start)
            tokens[start : start + taken] = rest[:taken]
            following = rest[1 : taken + 1]  # one less at the document's end: the last label is already there
            labels[start : start + len(following)] = following
            loss_mask[start : start + taken] = True
            self._offset += taken
            if self._offset == len(document):
                self._finish_document()
            borders.append(start + -(-taken // self._chunk_size) * self._chunk_size)
        return PackedSequence(tokens, labels, loss_mask, np.array(borders, dtype=np.int32))

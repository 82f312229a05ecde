"""Cuts a row's documents into windows of equal length.

Knows the tokens of one row. Does not know files, tokenizers or the batch.
"""

from collections.abc import Callable

import numpy as np


class DocumentPacker:
    """Windows of sequence_length + 1 tokens over documents that follow each other, each ended by one token.

    Successive windows share one token (the last of one is the first of the next), so that with inputs w[:-1] and
    labels w[1:] every token but the very first is predicted exactly once. The work is linear in the tokens: a window is
    filled by slices of the document's array, which is held once and never copied as a whole.

    next_document: returns the next document's token ids, 1-d, any integer dtype, never empty.
    """

    def __init__(self, next_document: Callable[[], np.ndarray], *, sequence_length: int, end_of_document: int):
        self._next_document = next_document
        self._length = sequence_length
        self._end_of_document = end_of_document
        self._document: np.ndarray | None = None
        self._offset = 0
        self._last_token: int | None = None

    @property
    def inside_document(self) -> bool:
        """Whether the last window ended before its document's end-of-document token."""
        return self._document is not None

    @property
    def offset(self) -> int:
        """Tokens of the current document that are in earlier windows; 0 between two documents."""
        return self._offset

    @property
    def last_token(self) -> int | None:
        """The token the next window begins with; None before the first window."""
        return self._last_token

    def resume(self, *, offset: int, last_token: int | None) -> None:
        """Continue as if `offset` tokens of the next document that arrives had been packed already."""
        self._document = None
        self._offset = offset
        self._last_token = last_token

    def next_window(self) -> np.ndarray:
        """int64 [sequence_length + 1].

        Raises ValueError if the document is shorter than the offset resumed at: the corpus has changed.
        """
        window = np.empty(self._length + 1, dtype=np.int64)
        filled = 0
        if self._last_token is not None:
            window[0] = self._last_token
            filled = 1
        while filled < len(window):
            if self._document is None:
                self._document = self._next_document()
                if self._offset > len(self._document):
                    raise ValueError(
                        f"resumed at token {self._offset} of a document that now has {len(self._document)} tokens: "
                        "the corpus or the tokenizer has changed since the checkpoint; restore it or start a new run"
                    )
            taken = min(len(self._document) - self._offset, len(window) - filled)
            window[filled : filled + taken] = self._document[self._offset : self._offset + taken]
            filled += taken
            self._offset += taken
            if self._offset == len(self._document) and filled < len(window):
                window[filled] = self._end_of_document
                filled += 1
                self._document = None
                self._offset = 0
        self._last_token = int(window[-1])
        return window

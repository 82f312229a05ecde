"""The documents of one row of the global batch, for ever, with a position that can be saved.

Knows one row's share of a corpus: documents row, row + rows, row + 2 x rows, ... (or as many of its shards,
where `datasets` can deal whole shards out evenly). Does not know windows or ranks. Since the share depends
on the row and the number of rows only, any data-parallel rank can go on where another stopped.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from datasets.distributed import split_dataset_by_node

from dash_dist.data.corpus import Corpus, UndecodableDocument

logger = logging.getLogger(__name__)

# Where each epoch has its own order, one order may leave a row without text; this many in a row is no accident.
_EMPTY_EPOCHS = 10


class RowDocuments:
    """Cursor over the documents of one row; when they end it starts again (the next epoch).

    encode: token ids of a text, 1-d. undecodable: what to do with a document that is not UTF-8. reported:
    files whose undecodable documents were logged already, shared by the rows of a rank.
    """

    def __init__(
        self,
        corpus: Corpus,
        encode: Callable[[str], np.ndarray],
        *,
        row: int,
        rows: int,
        undecodable: Literal["skip", "error"],
        reported: set[str],
    ):
        self._corpus = corpus
        self._encode = encode
        self._row = row
        self._rows = rows
        self._undecodable = undecodable
        self._reported = reported
        self._skipped: Counter[str] = Counter()
        self._empty_epochs = 0
        self._start(epoch=0, stream_state=None)

    @property
    def skipped(self) -> int:
        """Documents passed over so far because they are empty or undecodable, counted again in each epoch."""
        return self._skipped.total()

    def next_document(self) -> np.ndarray:
        """Token ids of the next document that has any, 1-d.

        Raises ValueError if the row finds none in a whole epoch, instead of looking for ever; for an
        undecodable document if those are errors; and what `Corpus.read` raises.
        """
        while True:
            self._before = self.position()
            reference = next(self._references, None)
            if reference is None:
                self._finish_epoch()
                continue
            self._stream_state = self._dataset.state_dict()
            tokens = self._read(reference)
            if tokens is not None:
                self._found = True
                return tokens

    def position(self) -> dict[str, Any]:
        """Just behind the document returned last; JSON-serialisable, its size does not grow with the data."""
        return {"epoch": self._epoch, "stream": self._stream_state, "skipped": dict(self._skipped)}

    def position_before(self) -> dict[str, Any]:
        """Just before the document returned last, behind the documents skipped on the way to it."""
        return self._before

    def resume(self, position: dict[str, Any]) -> None:
        """Continue at a position; nothing is read before the next document is asked for."""
        self._skipped = Counter(position["skipped"])
        self._empty_epochs = 0
        self._start(epoch=position["epoch"], stream_state=position["stream"])

    def _start(self, *, epoch: int, stream_state: dict[str, Any] | None) -> None:
        self._epoch = epoch
        # A fresh split each time: a dataset that was resumed once would begin every later epoch there.
        self._dataset = split_dataset_by_node(self._corpus.stream(epoch), rank=self._row, world_size=self._rows)
        if stream_state is not None:
            self._dataset.load_state_dict(copy.deepcopy(stream_state))
        self._references: Iterator[dict[str, Any]] = iter(self._dataset)
        # Kept here, since a dataset that was resumed but not read from yet reports its beginning.
        self._stream_state = stream_state
        # The rest of an epoch that is resumed may well be empty: the part before it was not.
        self._found = stream_state is not None
        self._skipped_before = self._skipped.copy()
        self._before = self.position()

    def _finish_epoch(self) -> None:
        self._empty_epochs = 0 if self._found else self._empty_epochs + 1
        if self._empty_epochs == (_EMPTY_EPOCHS if self._corpus.order_changes else 1):
            skipped = self._skipped - self._skipped_before
            why = f"all {skipped.total()} skipped: {dict(skipped)}" if skipped else "there is none"
            raise ValueError(
                f"row {self._row} of the global batch finds no document with text in "
                f"{self._corpus.description} (of its documents, {why}). Each of the {self._rows} rows reads "
                "documents of its own: give more documents, or lower global_batch_size"
            )
        self._start(epoch=self._epoch + 1, stream_state=None)

    def _read(self, reference: dict[str, Any]) -> np.ndarray | None:
        """Token ids, or None for a document that is skipped and counted."""
        try:
            tokens = self._encode(self._corpus.read(reference))
        except UndecodableDocument as error:
            self._skip_undecodable(reference, error)
            return None
        if len(tokens) == 0:
            self._skipped["empty"] += 1
            logger.debug("skipped %s: it is empty", self._corpus.name(reference))
            return None
        return tokens

    def _skip_undecodable(self, reference: dict[str, Any], error: UndecodableDocument) -> None:
        name = self._corpus.name(reference)
        if self._undecodable == "error":
            raise ValueError(
                f"{name} is not UTF-8 text: {error}; convert or remove it, or set data.undecodable=skip"
            ) from error
        self._skipped["undecodable"] += 1
        file = self._corpus.file(reference)
        if file not in self._reported:
            self._reported.add(file)
            logger.warning(
                "skipped %s: it is not UTF-8 text (%s); later ones in this file are counted, not logged",
                name,
                error,
            )

"""The tokens of one shard on disk, in the format of Megatron-core's indexed datasets.

Knows how a shard is written whole and read document by document; does not know the order of documents. A folder holds
tokens.bin and tokens.idx, which Megatron-core reads, documents.npz with the place and a digest of every document,
shard.json with counts and the names of damaged documents, and the loss spans of rows whose tokens do not all count.
"""

import json
import os
import shutil
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from dash_dist.data.columns import DamagedDocument
from dash_dist.data.loss_spans import SpanWriter
from dash_dist.data.readers import Document, Row, file_of, name_of, read_documents, read_rows
from dash_dist.data.rows import Rows, encode_row
from dash_dist.data.sources import Shard
from dash_dist.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024
_PIECE_CHARACTERS = 1 << 19
_NAMED = 20
MAX_DOCUMENT_TOKENS = 2**31 - 1
"""Megatron-core's index counts a document's tokens in 32 bits."""


@dataclass(frozen=True)
class ShardCounts:
    """Contents of a shard.

    Attributes:
        documents: places, of documents with and without tokens.
        tokens: end-of-document tokens included.
        empty: documents without text.
        damaged: documents that cannot be read.
        loss_tokens: tokens that count in the loss; None if all do.
        named: the first of those: number of the part, and what follows the name of its file. So files may move.
    """

    documents: int
    tokens: int
    empty: int
    damaged: int
    named: tuple[tuple[int, str], ...]
    loss_tokens: int | None = None

    def names(self, shard: Shard) -> list[str]:
        """Return the first damaged documents where they are now, each with the reason."""
        return [f"{file_of(shard.parts[part])}{told}" for part, told in self.named]


@dataclass
class _Places:
    part: "array[int]" = field(default_factory=lambda: array("i"))
    place: "array[int]" = field(default_factory=lambda: array("q"))
    digest: "array[int]" = field(default_factory=lambda: array("I"))
    damaged: "array[int]" = field(default_factory=lambda: array("B"))


class _Writer:
    """Documents, appended to an indexed dataset."""

    def __init__(self, folder: Path, shard: Shard, tokenizer: Tokenizer, *, stop_at_damage: bool, special_tokens: bool):
        self._shard = shard
        self._tokenizer = tokenizer
        self._stop = stop_at_damage
        whole = shard.rows is not None and shard.rows.whole
        before, after = tokenizer.special_tokens if special_tokens and not whole else ((), ())
        if not len(after) or after[-1] != tokenizer.end_of_document:
            after = (*after, tokenizer.end_of_document)
        self._dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._before = np.asarray(before, dtype=self._dtype)
        self._after = np.asarray(after, dtype=self._dtype)
        self._builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=self._dtype)
        # Lists of Python's integers would take five times the memory.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])
        self._index = str(folder / "tokens.idx")
        self._places = _Places()
        self._spans = None if shard.rows is None else SpanWriter()
        self._unwritten: list[np.ndarray] = []
        self._tokens = 0
        self._empty = 0
        self._named: list[tuple[int, str]] = []

    def add_texts(self, documents: list[tuple[int, int, str]]) -> None:
        """Append whole documents: part, place and text."""
        texts = [text for _, _, text in documents]
        for (part, place, text), tokens in zip(documents, self._tokenizer.encode_batch(texts), strict=True):
            self._start()
            if text:
                self._write(tokens)
            self._finish(part, place, zlib.crc32(text.encode("utf-8")))
        self._flush()

    def add_pieces(self, part: int, place: int, pieces: Iterable[str]) -> None:
        """Append a document that is read in pieces, or its place if it turns out to be damaged."""
        digest = 0

        def passing() -> Iterator[str]:
            nonlocal digest
            for piece in pieces:
                digest = zlib.crc32(piece.encode("utf-8"), digest)
                yield piece

        self._start()
        try:
            for tokens in self._tokenizer.encode_pieces(passing()):
                self._write(tokens)
                self._flush()
        except DamagedDocument as error:
            self._unwritten.clear()
            self._builder.data_file.seek(self._tokens * np.dtype(self._dtype).itemsize)
            self._builder.data_file.truncate()
            self.add_damaged(part, place, error)
        else:
            self._finish(part, place, digest)
            self._flush()

    def add_row(self, part: int, row: Row, rows: Rows) -> None:
        """Append a row of several columns, or its place if it turns out to be damaged."""
        try:
            if isinstance(row.values, DamagedDocument):
                raise row.values
            encoded = encode_row(rows, row.values, self._tokenizer)
        except DamagedDocument as error:
            self.add_damaged(part, row.place, error)
            return
        except ValueError as error:
            raise ValueError(f"{name_of(self._shard.parts[part], row.place)}: {error}") from error
        self._start()
        if encoded is None:
            self._finish(part, row.place, 0)
            return
        ids, spans, digest = encoded
        self._write(ids)
        ended = rows.whole and ids[-1] == self._tokenizer.end_of_document
        spans = [(start + len(self._before), stop + len(self._before)) for start, stop in spans]
        if not rows.whole:
            spans.append((self._length, self._length + len(self._after)))
        self._finish(part, row.place, digest, spans, ended=ended)
        self._flush()

    def add_damaged(self, part: int, place: int, error: DamagedDocument) -> None:
        """Append the place of a document that cannot be read."""
        if self._stop or len(self._named) < _NAMED:
            described = f"{name_of(self._shard.parts[part], place)}: {error}"
            if self._stop:
                raise ValueError(f"{described}; repair or remove it, or set data.damaged=skip")
            self._named.append((part, described.removeprefix(file_of(self._shard.parts[part]))))
        self._append(part, place, 0, 0, damaged=True)

    def _start(self) -> None:
        self._length = 0

    def _write(self, tokens: np.ndarray) -> None:
        parts = (tokens,) if self._length or not len(tokens) else (self._before, tokens)
        self._unwritten += parts
        self._length += sum(len(part) for part in parts)

    def _flush(self) -> None:
        if self._unwritten:
            tokens = np.concatenate(self._unwritten, dtype=self._dtype, casting="unsafe")
            self._builder.data_file.write(tokens.data)
            self._unwritten.clear()

    def _finish(
        self, part: int, place: int, digest: int, spans: Iterable[tuple[int, int]] = (), *, ended: bool = False
    ) -> None:
        if self._length and not ended:
            self._unwritten.append(self._after)
            self._length += len(self._after)
        elif not self._length:
            self._empty += 1
        if self._length > MAX_DOCUMENT_TOKENS:
            raise ValueError(
                f"{name_of(self._shard.parts[part], place)} has {self._length} tokens, more than {MAX_DOCUMENT_TOKENS} "
                "in one document: split it into several"
            )
        self._append(part, place, self._length, digest, damaged=False, spans=spans)

    def _append(
        self,
        part: int,
        place: int,
        length: int,
        digest: int,
        *,
        damaged: bool,
        spans: Iterable[tuple[int, int]] = (),
    ) -> None:
        if self._spans is not None:
            self._spans.add(spans)
        self._builder.sequence_lengths.append(length)
        self._builder.end_document()
        self._tokens += length
        places = self._places
        places.part.append(part)
        places.place.append(place)
        places.digest.append(digest)
        places.damaged.append(damaged)

    def close(self, folder: Path) -> ShardCounts:
        """Write index, places and counts."""
        self._builder.data_file.flush()
        os.fsync(self._builder.data_file.fileno())
        self._builder.finalize(self._index)
        places = self._places
        digests = np.array(places.digest, dtype=np.uint32)
        damaged = np.array(places.damaged, dtype=bool)
        np.savez(
            folder / "documents.npz",
            part=np.array(places.part, dtype=np.int32),
            place=np.array(places.place, dtype=np.int64),
            digest=digests,
            damaged=damaged,
        )
        if self._spans is not None:
            self._spans.close(folder)
        counts = ShardCounts(
            documents=len(digests),
            tokens=self._tokens,
            empty=self._empty,
            damaged=int(damaged.sum()),
            named=tuple(self._named),
            loss_tokens=None if self._spans is None else self._spans.tokens,
        )
        (folder / "shard.json").write_text(json.dumps(asdict(counts)))
        return counts


def write_shard(
    shard: Shard,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    stop_at_damage: bool,
    special_tokens: bool,
) -> ShardCounts:
    """Tokenise `shard` into `folder`, which appears whole or not at all. Another process may write it at the same time.

    Raises:
        ValueError: a column or a file is not as the configuration says, or a document is damaged and `stop_at_damage`.
        OSError: the storage of the data or of the cache fails, or is full.
    """
    partial = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}")
    partial.mkdir(parents=True)
    try:
        writer = _Writer(partial, shard, tokenizer, stop_at_damage=stop_at_damage, special_tokens=special_tokens)
        if shard.rows is not None:
            for index, part_of_rows in enumerate(shard.parts):
                for row in read_rows(part_of_rows, shard.columns):
                    writer.add_row(index, row, shard.rows)
        for batch in _batches(shard) if shard.rows is None else ():
            if isinstance(batch, list):
                writer.add_texts(batch)
            else:
                part, document, damage = batch
                if damage is None:
                    writer.add_pieces(part, document.place, document.pieces)
                else:
                    writer.add_damaged(part, document.place, damage)
        counts = writer.close(partial)
        try:
            partial.rename(folder)
        except OSError:
            if read_counts(folder) is None:
                raise
            # There already, from another process.
        return counts
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_Batch = list[tuple[int, int, str]] | tuple[int, Document, DamagedDocument | None]


def _batches(shard: Shard) -> Iterator[_Batch]:
    """Yield whole documents in batches, and long or damaged ones alone."""
    batch: list[tuple[int, int, str]] = []
    characters = 0
    for index, part in enumerate(shard.parts):
        for document in read_documents(part, shard.columns.names[0]):
            text, rest, damage = _beginning(document)
            if damage is None and rest is None:
                batch.append((index, document.place, text))
                characters += len(text)
                if characters < _BATCH_CHARACTERS and len(batch) < _BATCH_DOCUMENTS:
                    continue
            if batch:
                yield batch
                batch, characters = [], 0
            if damage is not None:
                yield index, document, damage
            elif rest is not None:
                yield index, Document(document.place, _joined(text, rest)), None
    if batch:
        yield batch


def _beginning(document: Document) -> tuple[str, Iterator[str] | None, DamagedDocument | None]:
    """Return the text up to some megabytes, and the pieces that follow, None if that was all."""
    pieces = iter(document.pieces)
    text = ""
    try:
        for piece in pieces:
            text += piece
            if len(text) > _PIECE_CHARACTERS:
                return text, pieces, None
    except DamagedDocument as error:
        return "", None, error
    return text, None, None


def _joined(text: str, rest: Iterator[str]) -> Iterator[str]:
    for start in range(0, len(text), _PIECE_CHARACTERS):
        yield text[start : start + _PIECE_CHARACTERS]
    yield from rest


def read_counts(folder: Path) -> ShardCounts | None:
    """Return the counts of a shard, or None if it is not there whole."""
    try:
        counts = json.loads((folder / "shard.json").read_text())
        return ShardCounts(**{**counts, "named": tuple((part, told) for part, told in counts["named"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} is damaged ({error}): remove the folder, and its tokens are made again") from error

"""A corpus: an ordered collection of documents, read as a stream.

Knows files, their formats and the hub. Does not know tokens, rows or ranks. Local files go through
`IterableDataset.from_generator` with readers that hand on raw bytes: the loaders of `datasets` decode a file or a whole
batch of rows at once and do not say which file failed, so one bad document would take its neighbours along.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, load_dataset_builder
from datasets import config as datasets_config

from dash_dist.config.data import DataConfig
from dash_dist.data.files import (
    files_fingerprint,
    format_of,
    printable,
    resolve_paths,
    size_of_readable_file,
    standard_library_files,
)


class UndecodableDocument(Exception):
    """The bytes of one document are not UTF-8."""


class Corpus(Protocol):
    """Documents in a fixed order per epoch."""

    description: str
    """For messages."""
    fingerprint: str
    """Equal for two corpora only if a position in one is the same position in the other."""
    order_changes: bool
    """Whether each epoch has an order of its own."""

    def stream(self, epoch: int) -> IterableDataset:
        """References to the documents, in the order of this epoch; cheap to step over."""

    def read(self, reference: dict[str, Any]) -> str:
        """The document's text, "" if it has none.

        Raises UndecodableDocument for bytes that are not UTF-8, ValueError naming the place for a missing
        column or a line that is not JSON, OSError for a file that cannot be read.
        """

    def name(self, reference: dict[str, Any]) -> str:
        """Where the document is, for messages: its file, and its line or row if it shares the file."""

    def file(self, reference: dict[str, Any]) -> str:
        """The file the document is in, or the dataset's name."""


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config` names.

    Raises FileNotFoundError for paths that match nothing, PermissionError for files that may not be read,
    ValueError for files of mixed or damaged formats and for missing columns.
    """
    if config.source == "hub":
        return HubCorpus(config)
    if config.source == "stdlib":
        return FileCorpus(standard_library_files(), "text", config, "the standard library of this Python")
    paths = resolve_paths(config)
    return FileCorpus(paths, format_of(paths, config), config, f"data.paths={list(config.paths)}")


class FileCorpus:
    """Local files of one format."""

    def __init__(self, paths: list[str], file_format: str, config: DataConfig, description: str):
        self.description = f"{description} ({len(paths)} files, {file_format})"
        self.order_changes = config.shuffle_seed is not None
        self._format = file_format
        self._column = config.text_column
        self._seed = config.shuffle_seed
        sizes = [size_of_readable_file(path) for path in paths]
        self.fingerprint = files_fingerprint(paths, sizes, [file_format, config.text_column, config.shuffle_seed])
        # A text file is a document even when empty, skipped and counted; JSON Lines without a byte hold none.
        holds_documents = [size > 0 or file_format != "jsonl" for size in sizes]
        self._paths = [path for path, holds in zip(paths, holds_documents, strict=True) if holds]
        self._row_groups = (
            {path: _row_groups_of(path, self._column) for path in self._paths} if file_format == "parquet" else {}
        )
        self._stream: tuple[int, IterableDataset] | None = None

    def stream(self, epoch: int) -> IterableDataset:
        order = epoch if self.order_changes else 0
        if self._stream is None or self._stream[0] != order:
            self._stream = order, self._make_stream(order)
        return self._stream[1]

    def _make_stream(self, epoch: int) -> IterableDataset:
        paths = self._paths
        if self._seed is not None:
            paths = [paths[i] for i in np.random.default_rng([self._seed, epoch]).permutation(len(paths))]
        # `datasets` cuts each list into shards; a position is a shard and a number of documents in it.
        if self._format == "text":
            return IterableDataset.from_generator(_list_texts, gen_kwargs={"paths": paths})
        if self._format == "jsonl":
            return IterableDataset.from_generator(_list_lines, gen_kwargs={"paths": paths})
        groups = [(path, group) for path in paths for group in range(self._row_groups[path])]
        return IterableDataset.from_generator(
            _list_parquet_rows, gen_kwargs={"row_groups": groups, "column": self._column}
        )

    def read(self, reference: dict[str, Any]) -> str:
        if self._format == "text":
            return _decode(Path(reference["path"]).read_bytes())
        if self._format == "jsonl":
            return self._read_line(_decode(reference["line"]), self.name(reference))
        return _decode(reference["text"] or b"")

    def _read_line(self, line: str, name: str) -> str:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {error}; repair or remove the line") from error
        if not isinstance(row, dict) or self._column not in row:
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{name} has no column {self._column!r}, it has {keys}: set data.text_column")
        return _text_or_error(row[self._column], self._column, name)

    def name(self, reference: dict[str, Any]) -> str:
        path = printable(reference["path"])
        if self._format == "text":
            return path
        if self._format == "jsonl":
            return f"{path} line {reference['number']}"
        return f"{path} row {reference['number']} of row group {reference['row_group']}"

    def file(self, reference: dict[str, Any]) -> str:
        return reference["path"]


class HubCorpus:
    """A dataset of the hub, or a folder in the hub's layout, streamed."""

    order_changes = False

    def __init__(self, config: DataConfig):
        assert config.name is not None  # the config's validator refuses a hub source without a name
        self._column = config.text_column
        self._name = config.name
        self.description = f"data.name={config.name} (subset {config.subset}, split {config.split})"
        try:
            builder = load_dataset_builder(config.name, config.subset, revision=config.revision)
        except ConnectionError as error:
            if not datasets_config.HF_HUB_OFFLINE:
                raise
            raise ValueError(
                f"{self.description} is not in this machine's cache, and HF_HUB_OFFLINE is set: download it first, or "
                f"unset HF_HUB_OFFLINE ({error})"
            ) from None
        try:
            stream = builder.as_streaming_dataset(split=config.split)
        except ValueError as error:
            raise ValueError(f"{self.description}: {error}: set data.split") from error
        columns = stream.column_names
        if columns is not None:
            if self._column not in columns:
                raise ValueError(
                    f"{self.description} has no column {self._column!r}, it has {columns}: set data.text_column"
                )
            stream = stream.select_columns([self._column])
        self._stream: IterableDataset = stream
        # builder.hash is the commit for a dataset of the hub.
        identity = [config.name, config.subset, config.split, self._column, builder.hash]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def stream(self, epoch: int) -> IterableDataset:
        return self._stream

    def read(self, reference: dict[str, Any]) -> str:
        if self._column not in reference:
            raise ValueError(
                f"{self.description} has no column {self._column!r}, it has {sorted(reference)}: set data.text_column"
            )
        return _text_or_error(reference[self._column], self._column, self.description)

    def name(self, reference: dict[str, Any]) -> str:
        return f"a document of {self.description}"

    def file(self, reference: dict[str, Any]) -> str:
        return self._name


# The readers are module-level functions: `datasets` names its streams by a hash of the function and its arguments.


def _list_texts(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield {"path": path}


def _list_lines(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield {"path": path, "number": number, "line": line}


def _list_parquet_rows(row_groups: list[tuple[str, int]], column: str) -> Iterator[dict[str, Any]]:
    for path, group in row_groups:
        number, name = 0, printable(path)
        try:
            with _open(path) as source, pq.ParquetFile(source) as file:
                for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
                    # As bytes, so that a row that is not UTF-8 fails alone.
                    for text in batch.column(0).cast(pa.large_binary()):
                        yield {"path": path, "row_group": group, "number": number, "text": text.as_py()}
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{name}: cannot read row group {group}: {error}; repair or remove the file") from error


def _open(path: str) -> pa.NativeFile:
    """By the bytes of its name: pyarrow refuses a str that is not UTF-8."""
    return pa.OSFile(os.fsencode(path))


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UndecodableDocument(str(error)) from error


def _text_or_error(value: object, column: str, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{name}: column {column!r} holds {type(value).__name__}, not text: set data.text_column to a text column"
        )
    # JSON can spell half of a surrogate pair ("\ud800"), which is a str but no text.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UndecodableDocument(str(error)) from error
    return value


def _row_groups_of(path: str, column: str) -> int:
    name = printable(path)
    try:
        with _open(path) as source, pq.ParquetFile(source) as file:
            schema, row_groups = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a readable Parquet file: {error}; repair or remove the file") from error
    if column not in schema.names:
        raise ValueError(f"{name} has no column {column!r}, it has {schema.names}: set data.text_column")
    if schema.names.count(column) > 1:
        raise ValueError(f"{name} has several columns {column!r}, it has {schema.names}: rename all but one of them")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise ValueError(f"{name}: column {column!r} holds {kind}, not text: set data.text_column to a text column")
    return row_groups

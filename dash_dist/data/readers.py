"""Readers of documents, one for each format: file ranges and shards of hub datasets as a stream of texts.

Knows formats. Does not know tokens. A document that cannot be read keeps its place as a damaged one, so that repairing
it moves no other document.
"""

import codecs
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dash_dist.data.columns import Columns, DamagedDocument, fields_of_line, missing_at, text_of, value_of
from dash_dist.data.files import FileFormat, encoding_of, open_bytes, printable

_BLOCK = 4 << 20
_REMEDY = "data.text_column, or the columns of data.rows,"
_DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowInvalid)
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_null,
)


@dataclass(frozen=True)
class FileRange:
    """Documents of one file.

    Attributes:
        start, stop: bytes of JSON Lines in which the documents begin, or row groups of Parquet; 0 and None are all.
    """

    path: str
    format: FileFormat
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class HubShard:
    """One of `shards` parts of a dataset of the hub."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    shard: int
    shards: int


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        place: byte offset of a line of JSON (number of a line of UTF-16), number of a row, 0 of a text file.
        pieces: its text, in order; reading them raises DamagedDocument where it cannot be read.
    """

    place: int
    pieces: Iterable[str]


@dataclass(frozen=True)
class Row:
    """One row of several columns.

    Attributes:
        place: as of a document.
        values: of each column, None where it has none; texts of Parquet as bytes. Or the reason why it cannot be read.
    """

    place: int
    values: tuple[Any, ...] | DamagedDocument


def read_documents(part: FileRange | HubShard, column: str) -> Iterator[Document]:
    """Yield the documents of `part` in order.

    Raises ValueError for a column that no document has, or that is not text; OSError for storage that does not answer.
    """
    if isinstance(part, FileRange) and part.format == "text":
        yield Document(0, _text_pieces(part.path))
        return
    for row in read_rows(part, Columns((column,))):
        try:
            if isinstance(row.values, DamagedDocument):
                raise row.values
            yield Document(row.place, (text_of(row.values[0], column),))
        except DamagedDocument as error:
            yield Document(row.place, _raising(error))


def read_rows(part: FileRange | HubShard, columns: Columns) -> Iterator[Row]:
    """Yield the rows of `part` in order.

    Raises ValueError for a column that no row has; OSError for storage that does not answer.
    """
    if isinstance(part, HubShard):
        return _read_hub(part, columns)
    if part.format == "jsonl":
        return _read_lines(part, columns)
    return _read_table(part, columns)


def file_of(part: FileRange | HubShard) -> str:
    """Return the file that begins the names of all documents of `part`, "" where there is none."""
    return "" if isinstance(part, HubShard) else printable(part.path)


def name_of(part: FileRange | HubShard, place: int) -> str:
    """Return where a document is, for messages: its file, and its line or row if it shares the file."""
    if isinstance(part, HubShard):
        return f"row {place} of shard {part.shard} of {part.name}"
    path = file_of(part)
    if part.format == "text":
        return path
    if part.format == "jsonl":
        return f"{path} line {_line_number(part.path, place)}"
    return f"{path} row {place}"


def _line_number(path: str, offset: int) -> int:
    number = 1
    if not offset:  # also of a file that cannot even be opened
        return number
    if encoding_of(path)[0] != "utf-8":
        return offset + 1  # see _lines_of_utf16
    with open_bytes(path) as file:
        while offset > 0 and (block := file.read(min(offset, _BLOCK))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _text_pieces(path: str) -> Iterator[str]:
    try:
        encoding, mark = encoding_of(path)
        decoder = codecs.getincrementaldecoder(encoding)("strict")
        with open_bytes(path) as file:
            file.read(mark)
            while block := file.read(_BLOCK):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DamagedDocument(str(error)) from error
    except _DECOMPRESSION_ERRORS as error:
        raise DamagedDocument(f"cannot be decompressed: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DamagedDocument(f"cannot be decompressed: {error}") from error  # gzip and bz2 raise it without a number


def _read_lines(part: FileRange, columns: Columns) -> Iterator[Row]:
    found, lacking = False, ""
    for offset, line in _lines(part):
        if isinstance(line, DamagedDocument):
            yield Row(offset, line)
            continue
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.isspace() or not line:
            continue
        try:
            fields = fields_of_line(line)
            missing = [(name, there) for name in columns.names if (there := missing_at(fields, name)) is not None]
            if required := [one for one in missing if one[0] not in columns.optional]:
                name, there = required[0]
                told = f"{name_of(part, offset)} has no column {name!r}, it has {there}: set {_REMEDY} to others"
                lacking = lacking or told
                raise DamagedDocument(f"no column {name!r}")
        except DamagedDocument as error:
            yield Row(offset, error)
        else:
            found = True
            yield Row(offset, tuple(value_of(fields, name) for name in columns.names))
    if lacking and not found:
        raise ValueError(lacking)


def _lines(part: FileRange) -> Iterator[tuple[int, bytes | DamagedDocument]]:
    """Yield the lines that begin in the range, as UTF-8, with their offsets; damage that ends the file comes last."""
    offset = 0
    try:
        encoding, mark = encoding_of(part.path)
        with open_bytes(part.path) as file:
            if encoding != "utf-8":
                yield from _lines_of_utf16(file, encoding, mark)
                return
            if part.start:
                file.seek(part.start - 1)
                offset = part.start - 1 + len(file.readline())
            while part.stop is None or offset < part.stop:
                line = file.readline()
                if not line:
                    return
                yield offset, line
                offset += len(line)
    except _DECOMPRESSION_ERRORS as error:
        yield offset, DamagedDocument(f"the file cannot be decompressed from here on: {error}")
    except OSError as error:
        if error.errno is not None:
            raise
        yield offset, DamagedDocument(f"the file cannot be decompressed from here on: {error}")


def _lines_of_utf16(file: IO[bytes], encoding: str, mark: int) -> Iterator[tuple[int, bytes | DamagedDocument]]:
    """Yield lines as UTF-8 with their numbers. Bytes of other characters can look like the end of a line."""
    file.read(mark)
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    waiting, number = "", 0
    while True:
        block = file.read(_BLOCK)
        try:
            waiting += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            yield number, DamagedDocument(f"the file cannot be decoded from here on: {error}")
            return
        *lines, waiting = waiting.split("\n")
        if not block and waiting:
            lines.append(waiting)
        for line in lines:
            yield number, line.encode("utf-8", errors="surrogatepass")
            number += 1
        if not block:
            return


def row_groups_of(path: str, columns: Columns) -> int:
    """Return the number of row groups of a Parquet file. Raises ValueError for a missing column or one without text."""
    name = printable(path)
    try:
        with _open(path) as source, pq.ParquetFile(source) as file:
            schema, row_groups = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a readable Parquet file: {error}; repair or remove the file") from error
    for column in columns.names:
        if column in columns.optional and column not in schema.names:
            continue
        kind = _type_of(schema, column, name)
        if columns.of_text and not _is_text(kind):
            raise ValueError(f"{name}: column {column!r} holds {kind}, not text: set {_REMEDY} to a text column")
    return row_groups


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_text(kind) for is_text in _TEXT_TYPES)


def _type_of(schema: pa.Schema, column: str, name: str) -> pa.DataType:
    if schema.names.count(column) > 1:
        raise ValueError(f"{name} has several columns {column!r}, it has {schema.names}: rename all but one of them")
    if column in schema.names:
        return schema.field(column).type
    first, *rest = column.split(".")
    missing = ValueError(f"{name} has no column {column!r}, it has {schema.names}: set {_REMEDY} to others")
    if first not in schema.names:
        raise missing
    kind = schema.field(first).type
    for key in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(key) < 0:
            raise missing
        kind = kind.field(key).type
    return kind


def _read_table(part: FileRange, columns: Columns) -> Iterator[Row]:
    name = printable(part.path)
    try:
        with _open(part.path) as source, pq.ParquetFile(source) as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            names = file.schema_arrow.names
            there = [column for column in columns.names if column not in columns.optional or column in names]
            for group in range(part.start, len(rows) if part.stop is None else part.stop):
                first = number = sum(rows[:group])
                try:
                    for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=there):
                        values = [
                            _column_of(batch, column, names) if column in there else None for column in columns.names
                        ]
                        for index in range(len(batch)):
                            yield Row(number, _values_at(values, index))
                            number += 1
                except (pa.ArrowException, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    for lost in range(number, first + rows[group]):
                        yield Row(lost, DamagedDocument(f"row group {group} cannot be read: {error}"))
    except pa.ArrowException as error:
        raise ValueError(f"{name}: not a readable Parquet file: {error}; repair or remove the file") from error


def _column_of(batch: pa.RecordBatch, column: str, names: list[str]) -> pa.Array:
    first, *rest = [column] if column in names else column.split(".")
    values = batch.column(first)
    for key in rest:
        values = pc.struct_field(values, key)
    # As bytes, so that a row that is not UTF-8 fails alone.
    return values.cast(pa.large_binary()) if _is_text(values.type) else values


def _values_at(columns: list[pa.Array | None], index: int) -> tuple[Any, ...] | DamagedDocument:
    try:
        return tuple(None if column is None else column[index].as_py() for column in columns)
    except UnicodeDecodeError as error:
        return DamagedDocument(str(error))


def _raising(error: DamagedDocument) -> Iterator[str]:
    raise error
    yield ""  # makes this an iterator, which raises when it is read


def _open(path: str) -> pa.NativeFile:
    """Open by the bytes of the name: pyarrow refuses a str that is not UTF-8."""
    return pa.OSFile(os.fsencode(path))


def _read_hub(part: HubShard, columns: Columns) -> Iterator[Row]:
    from datasets import load_dataset

    stream = load_dataset(part.name, part.subset, split=part.split, revision=part.revision, streaming=True)
    if part.shards > 1:
        stream = stream.shard(part.shards, part.shard)
    for number, row in enumerate(stream):
        yield Row(number, tuple(value_of(row, column) for column in columns.names))

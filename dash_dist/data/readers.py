"""Readers of documents, one for each format: file ranges and shards of hub datasets as a stream of texts.

Knows formats. Does not know tokens. A document that cannot be read keeps its place as a damaged one, so that repairing
it moves no other document.
"""

import codecs
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dash_dist.data.files import FileFormat, encoding_of, open_bytes, printable

_BLOCK = 4 << 20
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


class DamagedDocument(Exception):
    """A document cannot be read; the message gives the reason."""


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


def read_documents(part: FileRange | HubShard, column: str) -> Iterator[Document]:
    """Yield the documents of `part` in order.

    Raises ValueError for a column that no document has, or that is not text; OSError for storage that does not answer.
    """
    if isinstance(part, HubShard):
        return _read_hub(part, column)
    if part.format == "text":
        return iter([Document(0, _text_pieces(part.path))])
    if part.format == "jsonl":
        return _read_lines(part, column)
    return _read_rows(part, column)


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


def _read_lines(part: FileRange, column: str) -> Iterator[Document]:
    path = column.split(".")
    found, lacking = False, ""
    for offset, line in _lines(part):
        if isinstance(line, DamagedDocument):
            yield Document(offset, _raising(line))
            continue
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.isspace() or not line:
            continue
        try:
            text = _text_of_line(line, column, path)
        except KeyError as error:
            lacking = lacking or f"{name_of(part, offset)} has no column {column!r}, it has {error.args[0]}"
            yield Document(offset, _raising(DamagedDocument(f"no column {column!r}")))
        except DamagedDocument as error:
            yield Document(offset, _raising(error))
        else:
            found = True
            yield Document(offset, (text,))
    if lacking and not found:
        raise ValueError(f"{lacking}: set data.text_column")


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


def _text_of_line(line: bytes, column: str, path: list[str]) -> str:
    """Return the text of a line of JSON, "" for null. Raises KeyError with its keys if the column is missing."""
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedDocument(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DamagedDocument(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedDocument("not a JSON object")
    if column in value:
        return _checked(value[column], column)
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise KeyError(sorted(value) if isinstance(value, dict) else type(value).__name__)
        value = value[key]
    return _checked(value, column)


def _checked(value: object, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DamagedDocument(f"column {column!r} holds {type(value).__name__}, not text")
    # JSON can spell half of a surrogate pair ("\ud800"), which is a str but no text.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DamagedDocument(str(error)) from error
    return value


def row_groups_of(path: str, column: str) -> int:
    """Return the number of row groups of a Parquet file. Raises ValueError for a missing column or one without text."""
    name = printable(path)
    try:
        with _open(path) as source, pq.ParquetFile(source) as file:
            schema, row_groups = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a readable Parquet file: {error}; repair or remove the file") from error
    kind = _type_of(schema, column, name)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_text(kind) for is_text in _TEXT_TYPES):
        raise ValueError(f"{name}: column {column!r} holds {kind}, not text: set data.text_column to a text column")
    return row_groups


def _type_of(schema: pa.Schema, column: str, name: str) -> pa.DataType:
    if schema.names.count(column) > 1:
        raise ValueError(f"{name} has several columns {column!r}, it has {schema.names}: rename all but one of them")
    if column in schema.names:
        return schema.field(column).type
    first, *rest = column.split(".")
    missing = ValueError(f"{name} has no column {column!r}, it has {schema.names}: set data.text_column")
    if first not in schema.names:
        raise missing
    kind = schema.field(first).type
    for key in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(key) < 0:
            raise missing
        kind = kind.field(key).type
    return kind


def _read_rows(part: FileRange, column: str) -> Iterator[Document]:
    name = printable(part.path)
    try:
        with _open(part.path) as source, pq.ParquetFile(source) as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            top_level = column in file.schema_arrow.names
            for group in range(part.start, len(rows) if part.stop is None else part.stop):
                first = number = sum(rows[:group])
                try:
                    for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
                        values = batch.column(0)
                        for key in [] if top_level else column.split(".")[1:]:
                            values = pc.struct_field(values, key)
                        # As bytes, so that a row that is not UTF-8 fails alone.
                        for value in values.cast(pa.large_binary()):
                            yield Document(number, _decoded(value.as_py()))
                            number += 1
                except (pa.ArrowException, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    for lost in range(number, first + rows[group]):
                        reason = f"row group {group} cannot be read: {error}"
                        yield Document(lost, _raising(DamagedDocument(reason)))
    except pa.ArrowException as error:
        raise ValueError(f"{name}: not a readable Parquet file: {error}; repair or remove the file") from error


def _decoded(value: bytes | None) -> Iterable[str]:
    try:
        return ((value or b"").decode("utf-8"),)
    except UnicodeDecodeError as error:
        return _raising(DamagedDocument(str(error)))


def _raising(error: DamagedDocument) -> Iterator[str]:
    raise error
    yield ""  # makes this an iterator, which raises when it is read


def _open(path: str) -> pa.NativeFile:
    """Open by the bytes of the name: pyarrow refuses a str that is not UTF-8."""
    return pa.OSFile(os.fsencode(path))


def _read_hub(part: HubShard, column: str) -> Iterator[Document]:
    from datasets import load_dataset

    stream = load_dataset(part.name, part.subset, split=part.split, revision=part.revision, streaming=True)
    if part.shards > 1:
        stream = stream.shard(part.shards, part.shard)
    first, *rest = column.split(".")
    for number, row in enumerate(stream):
        value = row[column] if column in row else row[first]
        for key in [] if column in row else rest:
            value = None if value is None else value[key]
        try:
            yield Document(number, (_checked(value, column),))
        except DamagedDocument as error:
            yield Document(number, _raising(error))

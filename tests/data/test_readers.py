"""Documents of files in every format, encoding and compression."""

import bz2
import gzip
import json
import lzma
import os
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dash_dist.data.columns import DamagedDocument
from dash_dist.data.files import standard_library_files
from dash_dist.data.readers import FileRange, name_of, read_documents
from tests.data.data_streams import build, documents_of, files, json_lines

TEXTS = ["first line\nsecond\r\nthird", "é ✓ 😀", "x" * 5000, " spaces  "]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def read(path: Path, column: str = "text", file_format: str | None = None) -> list[str]:
    """The texts of a file; a damaged one is its reason in brackets."""
    part = FileRange(str(path), file_format or path.name.split(".")[1])
    found = []
    for document in read_documents(part, column):
        try:
            found.append("".join(document.pieces))
        except DamagedDocument as error:
            found.append(f"[{name_of(part, document.place).removeprefix(str(path))}: {error}]")
    return found


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_compressed_text_and_lines(tmp_path, suffix):
    compress = COMPRESS.get(suffix, bytes)
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(compress(json_lines(*TEXTS)))
    assert read(lines) == TEXTS
    text = tmp_path / f"a.text{suffix}"
    text.write_bytes(compress(TEXTS[1].encode() * 1000))
    assert read(text) == [TEXTS[1] * 1000]
    assert documents_of(files(tmp_path)) == [*TEXTS, TEXTS[1] * 1000]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kept", [0, 2, 5, 12, 0.5, 0.98])
def test_a_cut_off_file_is_damage_and_not_a_crash(tmp_path, suffix, kept):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghij \n", k=200)) for _ in range(3000)]
    content = COMPRESS[suffix](json_lines(*texts))
    kept = kept if isinstance(kept, int) else int(len(content) * kept)
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(content[:kept])
    (tmp_path / f"cut.text{suffix}").write_bytes(COMPRESS[suffix](texts[0].encode() * 100)[: kept or 1])
    (tmp_path / "fine.jsonl").write_bytes(json_lines("fine"))

    *whole, damage = read(tmp_path / f"cut.jsonl{suffix}") if kept else ["[: cannot be decompressed]"]
    assert whole == texts[: len(whole)]
    assert "cannot be decompressed" in damage
    (told,) = build(files(tmp_path))._corpus.damage
    assert f"cut.jsonl{suffix} line" in told or not kept
    assert f"cut.text{suffix}: cannot be decompressed" in told or kept > 100
    with pytest.raises(ValueError, match=r"cut\.(jsonl|text).*cannot be decompressed.*data\.damaged=skip"):
        build(files(tmp_path, damaged="stop"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_marks_and_line_ends(tmp_path, encoding, newline):
    """data_files.py bom.jsonl: the mark of files that were put together is also at the start of later lines."""
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    lines = [
        json.dumps({"text": text}, ensure_ascii=False) for text in ("ä", "二\u0a0aਊ", "c")
    ]  # U+0A0A has bytes of \n
    content = mark + newline.join(lines) + newline + newline + "\ufeff" + lines[0] + newline
    (tmp_path / "bom.jsonl").write_bytes(content.encode(encoding))
    assert read(tmp_path / "bom.jsonl") == ["ä", "二\u0a0aਊ", "c", "ä"]
    text = "first" + newline + "zweite ü"
    (tmp_path / "bom.text").write_bytes((mark + text).encode(encoding))
    assert read(tmp_path / "bom.text") == [text]


def test_the_case_of_the_byte_order_mark(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines("after a byte order mark"))
    assert documents_of(files(tmp_path)) == ["after a byte order mark"]
    assert build(files(tmp_path)).skipped_documents == 0


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_that_ends_in_half_a_character(tmp_path, encoding):
    content = ("\ufeff" + '{"text": "a"}\n{"text": "b"}\n').encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(content + b"\x00")
    whole_a, whole_b, damage = read(tmp_path / "a.jsonl")
    assert (whole_a, whole_b) == ("a", "b")
    assert damage.startswith("[ line 3: the file cannot be decoded")


def test_lines_that_are_no_documents_keep_their_places(tmp_path):
    lines = [
        b'{"text": "fine"}',
        b"",
        b'{"text": "cut',
        b'{"text": "\\ud800"}',
        b'{"text": 7}',
        b'{"text": null}',
        b'{"text": "\xff"}',
        b'{"other": "x"}',
        b"[" * 100_000,
        b'["text"]',
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    assert found[0] == "fine"
    assert found[-1] == "last"
    assert found[4] == ""
    reasons = {3: "not JSON", 4: "surrogates", 5: "holds int, not text", 7: "invalid start byte", 8: "no column 'text'"}
    reasons |= {9: "not JSON", 10: "not a JSON object"}
    for line, reason in reasons.items():
        (damage,) = [one for one in found if one.startswith(f"[ line {line}: ")]
        assert reason in damage
    stream = build(files(tmp_path), batch=1)
    (told,) = stream._corpus.damage
    assert "7 of 10 documents are skipped" in told
    assert "and 4 more" in told


def test_a_column_that_no_line_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n{"body": "y", "id": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 has no column 'text', it has \['body', 'id'\]: set data\."):
        build(files(tmp_path))
    assert documents_of(files(tmp_path, text_column="body")) == ["x", "y"]
    with pytest.raises(ValueError, match=r"no text: .*a\.jsonl line 1: column 'id' holds int, not text"):
        build(files(tmp_path, text_column="id"))


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_nested_columns(tmp_path, file_format):
    rows = [{"meta": {"body": "a", "n": 1}}, {"meta": {"body": None, "n": 2}}, {"meta": {"body": "c", "n": 3}}]
    path = tmp_path / f"a.{file_format}"
    if file_format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        missing = r"line 1 has no column 'meta.none', it has \['body', 'n'\]"
    else:
        pq.write_table(pa.Table.from_pylist([*rows, {"meta": None}]), path)
        missing = r"has no column 'meta.none', it has \['meta'\]"
    assert read(path, "meta.body") == ["a", "", "c", ""][: 3 + (file_format == "parquet")]
    assert documents_of(files(path, text_column="meta.body")) == ["a", "c"]
    with pytest.raises(ValueError, match=missing):
        build(files(path, text_column="meta.none"))


def test_a_column_whose_name_has_a_dot_goes_before_a_nested_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"meta.body": "flat", "meta": {"body": "nested"}}\n')
    assert read(tmp_path / "a.jsonl", "meta.body") == ["flat"]
    pq.write_table(pa.table({"meta.body": ["flat"], "meta": [{"body": "nested"}]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "meta.body") == ["flat"]


TEXT_TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary_large": pa.dictionary(pa.int8(), pa.large_string()),
    "dictionary_binary": pa.dictionary(pa.int16(), pa.binary()),
}


@pytest.mark.parametrize(
    ("kind", "nested"),
    # pyarrow writes no views inside of structs.
    [(kind, nested) for kind in TEXT_TYPES for nested in (False, True) if not (nested and kind.endswith("_view"))],
)
def test_every_type_of_text_in_tables(tmp_path, kind, nested):
    texts = ["a", None, "ä ✓", "", "a"] * 30
    values = [None if text is None else text.encode() for text in texts] if "binary" in kind else texts
    column = pa.array(values, TEXT_TYPES[kind])
    if nested:
        column = pa.StructArray.from_arrays([column], ["body"])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=70)
    found = read(tmp_path / "a.parquet", "text.body" if nested else "text")
    assert found == [text or "" for text in texts]


def test_a_table_without_values_has_no_text(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["", "", ""]
    with pytest.raises(ValueError, match="has no text"):
        build(files(tmp_path))


def test_rows_that_are_not_utf8_fail_alone(tmp_path):
    documents = [b"good", b"caf\xe9 \xff", b"", b"neighbour"]
    array = pa.Array.from_buffers(pa.string(), len(documents), pa.array(documents, pa.binary()).buffers())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    good, damage, empty, neighbour = read(tmp_path / "a.parquet")
    assert (good, empty, neighbour) == ("good", "", "neighbour")
    assert damage.startswith("[ row 1: ")


def test_a_damaged_row_group_loses_its_rows_alone(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i}" * 500 for i in range(9)]}), path, row_group_size=3)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    found = read(path)
    assert [text[:20] for text in found[:3]] == [f"[ row {i}: row group 0 can"[:20] for i in range(3)]
    assert found[3:] == [f"{i}" * 500 for i in range(3, 9)]


def test_tables_that_cannot_be_opened_are_refused(tmp_path):
    for damaged in (b"PAR1 and then nothing", b""):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
            build(files(tmp_path))
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text', it has \['body', 'id'\]"):
        build(files(tmp_path))
    with pytest.raises(ValueError, match="column 'id' holds int64, not text"):
        build(files(tmp_path, text_column="id"))


def test_mixed_formats_in_one_folder(tmp_path):
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "b.jsonl").write_bytes(json_lines("line 1", "line 2"))
    (tmp_path / "c.ndjson.gz").write_bytes(gzip.compress(json_lines("packed")))
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt.zst").write_bytes(zstd(b"packed text"))
    assert documents_of(files(tmp_path)) == ["text", "line 1", "line 2", "packed", "row", "packed text"]
    assert documents_of(files(tmp_path, format="jsonl")) == ["line 1", "line 2", "packed"]
    for name, message in (("f.zip", "unpack it"), ("f.parquet.gz", "Parquet compresses by itself")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=message):
            build(files(tmp_path))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.zst", ".parquet"])
def test_names_that_are_not_utf8(tmp_path, suffix):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + suffix.encode())
    with open(path, "wb") as file:
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": ["fine"]}), file)
        else:
            content = b"fine" if suffix == ".txt" else json_lines("fine") + b"{\n"
            file.write(zstd(content) if suffix.endswith(".zst") else content)
    stream = build(files(tmp_path))
    assert documents_of(files(tmp_path)) == ["fine"]
    for told in stream._corpus.damage:
        assert rf"\udcff{suffix} line 2" in told
        told.encode()
    json.dumps(stream.state_dict()).encode()


def test_text_is_read_as_it_is(tmp_path):
    text = "tab\there\r\nwindows é ✓\n\0"
    (tmp_path / "a.md").write_bytes(text.encode())
    assert documents_of(files(tmp_path)) == [text]


def test_a_late_byte_that_is_not_utf8_damages_the_whole_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 5_000_000 + b"\xff")  # behind tokens that are written
    (tmp_path / "b.txt").write_bytes(b"fine")
    assert documents_of(files(tmp_path)) == ["fine"]
    (told,) = build(files(tmp_path))._corpus.damage
    assert "a.txt: 'utf-8' codec" in told


def test_the_standard_library_has_no_tests_and_nothing_that_was_installed():
    paths = standard_library_files()
    root = Path(sysconfig.get_path("stdlib"))
    assert paths == sorted(paths)
    assert {str(root / "ast.py"), str(root / "json" / "decoder.py")} <= set(paths)
    parts = {part for path in paths for part in Path(path).relative_to(root).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}

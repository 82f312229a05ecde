"""What happens with files that are missing, damaged, empty or of another kind."""

import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dash_dist.config.data import DataConfig
from dash_dist.data.tokenizer import ByteTokenizer
from tests.data.data_streams import build, steps

BAD = b"caf\xe9 \xff"


def files(*paths, **options) -> DataConfig:
    return DataConfig(source="files", paths=tuple(str(path) for path in paths), **options)


def text_of(stream, count: int = 8) -> str:
    """Everything a stream of one row reads, documents joined."""
    return "".join(ByteTokenizer().decode(window[0, :-1]) for window in steps(stream, count))


def write_bad_corpus(folder, file_format: str) -> None:
    documents = [b"good", BAD, b"", b"neighbour", BAD]
    if file_format == "text":
        for i, document in enumerate(documents):
            (folder / f"{i}.txt").write_bytes(document)
    elif file_format == "jsonl":
        (folder / "a.jsonl").write_bytes(b"".join(b'{"text": "%b"}\n' % document for document in documents))
    else:
        # A string column with any bytes in it, as a careless writer leaves it.
        array = pa.Array.from_buffers(pa.string(), len(documents), pa.array(documents, pa.binary()).buffers())
        pq.write_table(pa.table({"text": array}), folder / "a.parquet")


@pytest.mark.parametrize("file_format", ["text", "jsonl", "parquet"])
def test_undecodable_and_empty_documents_are_skipped_and_counted(tmp_path, file_format, caplog):
    write_bad_corpus(tmp_path, file_format)
    stream = build(files(tmp_path), length=15, batch=1)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        # 15 tokens are the first epoch's "good" and "neighbour" with their ends; label 16 is the second
        # epoch's.
        assert text_of(stream, 1) == "goodneighbour"
    assert stream.skipped_documents == 3
    warnings = [record.getMessage() for record in caplog.records if "UTF-8" in record.getMessage()]
    names = ["1.txt", "4.txt"] if file_format == "text" else [f"a.{file_format}"]
    assert len(warnings) == len(names)
    for name, warning in zip(names, warnings, strict=True):
        assert name in warning
    resumed = build(files(tmp_path), length=15, batch=1)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.skipped_documents == 3
    assert text_of(resumed, 1) == text_of(stream, 1)
    assert resumed.skipped_documents == stream.skipped_documents == 6


@pytest.mark.parametrize(
    ("file_format", "name"),
    [("text", "1.txt"), ("jsonl", "a.jsonl line 2"), ("parquet", "a.parquet row 1 of row group 0")],
)
def test_undecodable_documents_can_be_errors(tmp_path, file_format, name):
    write_bad_corpus(tmp_path, file_format)
    stream = build(files(tmp_path, undecodable="error"), length=8, batch=1)
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 text"):
        text_of(stream)


def test_half_a_surrogate_pair_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}\n{"text": "fine"}\n{"text": null}\n')
    stream = build(files(tmp_path), length=5, batch=1)
    assert text_of(stream, 2) == "finefine"
    # Two in each of two epochs, and one before the document that the last label is from.
    assert stream.skipped_documents == 5


def test_file_names_that_are_not_utf8_are_told_in_characters_that_a_log_can_hold(tmp_path, caplog):
    (tmp_path / "\udcff.txt").write_bytes(b"\xff")
    (tmp_path / "fine.txt").write_text("fine")
    assert text_of(build(files(tmp_path), length=5, batch=1), 1) == "fine"
    assert any(r"\udcff.txt: it is not UTF-8" in record.getMessage() for record in caplog.records)


def test_text_is_read_as_it_is(tmp_path):
    text = "tab\there\r\nwindows é ✓\n"
    (tmp_path / "a.md").write_bytes(text.encode())
    assert text_of(build(files(tmp_path), length=len(text.encode()) + 1, batch=1), 1) == text


def test_missing_paths(tmp_path):
    for path in ("missing.txt", "*.txt", ""):
        with pytest.raises(FileNotFoundError, match=r"matches no file .*correct the path"):
            build(files(tmp_path / path))
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"link\.txt"):
        build(files(tmp_path))


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        build(files(tmp_path / "pipe"))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    # The tests may run as root, who may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"a\.txt may not be read"):
        build(files(tmp_path), batch=1)


def test_a_file_removed_during_the_run_is_named(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 20)
    stream = build(files(tmp_path), batch=1)
    stream.next_step()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        stream.next_step()


def test_fewer_documents_than_rows_fails_on_every_rank(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("text")
    for rank in range(4):
        with pytest.raises(ValueError, match=r"row 3 of the global batch .*there is none.*lower global_batch_size"):
            build(files(tmp_path), batch=4, rank=rank, size=4)


@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_a_corpus_without_text_is_an_error_not_a_loop(tmp_path, shuffle_seed):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(BAD)
    with pytest.raises(ValueError, match=r"of its documents, all 2 skipped: \{'empty': 1, 'undecodable': 1\}"):
        build(files(tmp_path, shuffle_seed=shuffle_seed), batch=1)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="there is none"):
        build(files(tmp_path / "a.jsonl", shuffle_seed=shuffle_seed), batch=1)


def test_a_corpus_that_loses_its_text_is_an_error_not_a_loop(tmp_path):
    (tmp_path / "a.txt").write_text("text" * 4)
    stream = build(files(tmp_path), batch=1)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="finds no document with text"):
        stream.next_step()


def test_a_row_that_one_order_leaves_without_text_goes_on_to_the_next(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("" if i == 0 else "some text")
    stream = build(files(tmp_path, shuffle_seed=0), length=8, batch=3)
    steps(stream, 20)
    assert stream.skipped_documents > 0


def test_missing_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 has no column 'text', it has \['body', 'id'\]"):
        build(files(tmp_path / "a.jsonl"), batch=1)
    assert text_of(build(files(tmp_path / "a.jsonl", text_column="body"), length=2, batch=1), 1) == "x"
    with pytest.raises(ValueError, match="column 'id' holds int, not text"):
        build(files(tmp_path / "a.jsonl", text_column="id"), batch=1)

    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet has no column 'text', it has \['body', 'id'\]"):
        build(files(tmp_path / "train.parquet"), batch=1)
    with pytest.raises(ValueError, match="column 'id' holds int64, not text"):
        build(files(tmp_path / "train.parquet", text_column="id"), batch=1)


def test_missing_column_or_split_of_a_hub_dataset(corpus):
    config = corpus("hub")
    with pytest.raises(ValueError, match=r"no column 'body', it has \['text', 'id'\]"):
        build(config.model_copy(update={"text_column": "body"}))
    with pytest.raises(ValueError, match="holds int, not text"):
        build(config.model_copy(update={"text_column": "id"}))
    with pytest.raises(ValueError, match=r"test.* Available splits: \['train'\]: set data\.split"):
        build(config.model_copy(update={"split": "test"}))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut off\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.jsonl line 1 is not JSON"):
        build(files(tmp_path / "deep.jsonl"), batch=1)
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 is not JSON"):
        text_of(build(files(tmp_path / "a.jsonl"), batch=1))
    for damaged in (b"PAR1 and then nothing", b""):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
            build(files(tmp_path / "a.parquet"), batch=1)


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i}" * 500 for i in range(9)]}), path, row_group_size=3)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: cannot read row group 0"):
        build(files(path), batch=1)


def test_mixed_and_compressed_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "row"}))
    with pytest.raises(ValueError, match=r"several formats, jsonl \(.*b\.jsonl\), text \(.*a\.txt\)"):
        build(files(tmp_path))
    assert text_of(build(files(tmp_path, format="jsonl"), length=4, batch=1), 1) == "row"
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="decompress it"):
        build(files(tmp_path, format="jsonl"))


def test_paths_are_read_in_order_once_and_without_hidden_files(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/3.txt", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    config = files(tmp_path / "b", tmp_path / "**" / "*.txt")
    length = len("b/1.txtb/2.txta/3.txt") + 3
    assert text_of(build(config, length=length, batch=1), 1) == "b/1.txtb/2.txta/3.txt"


def test_the_default_corpus_is_the_standard_library():
    stream = build(DataConfig(), length=4096, batch=2)
    text = text_of(stream, 4)
    assert "import" in text
    assert stream.state_dict()["rows"].keys() == {"0", "1"}

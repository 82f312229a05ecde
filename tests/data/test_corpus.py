"""Files that are missing, may not be read or hold no text, and the order in which files are found."""

import json
import os

import pytest

from dash_dist.config.data import DataConfig
from tests.data.data_streams import build, documents_of, files, steps, text_of


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


def test_files_are_not_needed_once_they_are_prepared(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 20)
    stream = build(files(tmp_path), batch=1)
    (tmp_path / "b.txt").unlink()
    assert {*text_of(stream, 5)} == {"a", "b"}


@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_a_corpus_without_text_is_an_error_not_a_loop(tmp_path, shuffle_seed):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 \xff")
    with pytest.raises(ValueError, match=r"data\.paths=.* has no text: .*b\.txt: 'utf-8' codec can't decode"):
        build(files(tmp_path, shuffle_seed=shuffle_seed), batch=1)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl.* has no text"):
        build(files(tmp_path / "a.jsonl", shuffle_seed=shuffle_seed), batch=1)


def test_empty_and_undecodable_documents_are_passed_over_and_counted(tmp_path):
    for number, content in enumerate((b"good", b"caf\xe9 \xff", b"", b"neighbour", b"\xff")):
        (tmp_path / f"{number}.txt").write_bytes(content)
    stream = build(files(tmp_path, shuffle_seed=None), length=15, batch=1)
    # 15 tokens are the first epoch's "good" and "neighbour" with their ends; label 16 is the second epoch's.
    assert text_of(stream, 1) == "goodneighbour"
    assert stream.skipped_documents == 3
    assert text_of(stream, 1) == "goodneighbour"
    assert stream.skipped_documents == 6
    (told,) = stream._corpus.damage
    assert told.count("2 of 5 documents are skipped") == 1
    assert "1.txt: 'utf-8'" in told
    assert "4.txt: 'utf-8'" in told


def test_missing_column_or_split_of_a_hub_dataset(corpus):
    config = corpus("hub")
    with pytest.raises(ValueError, match=r"no column 'body', it has \['text', 'id'\]"):
        build(config.model_copy(update={"text_column": "body"}))
    with pytest.raises(ValueError, match="holds int, not text"):
        build(config.model_copy(update={"text_column": "id"}))
    with pytest.raises(ValueError, match=r"test.* Available splits: \['train'\]: set data\.split"):
        build(config.model_copy(update={"split": "test"}))


def test_nested_columns_of_a_hub_dataset(tmp_path):
    rows = [{"meta": {"body": "a"}}, {"meta": None}, {"meta": {"body": None}}, {"meta": {"body": "d"}}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="hub", name=str(tmp_path), text_column="meta.body")
    assert documents_of(config) == ["a", "d"]
    assert build(config)._sources[0].record.documents == (4,)


def test_paths_are_read_in_order_once_and_without_hidden_files(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/3.txt", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    config = files(tmp_path / "b", tmp_path / "**" / "*.txt")
    assert documents_of(config) == ["b/1.txt", "b/2.txt", "a/3.txt"]


def test_the_default_corpus_is_the_standard_library():
    stream = build(DataConfig(), length=4096, batch=2)
    text = text_of(stream, 4)
    assert "import" in text
    assert stream.skipped_documents < 10
    assert len(steps(stream, 1)[0]) == 2

"""Cases that users reported: damage and its repair, and the cost of reading.

Others are beside what they are about: shares of files in test_mixture, hub datasets in test_stream, byte order marks in
test_readers, long documents in test_long_text.
"""

import json
import os
import re
from pathlib import Path

import pytest

from dash_dist.config.data import DataConfig
from tests.data.data_streams import build, documents_of, files, global_steps, json_lines, resume, saved, steps


def bytes_read() -> int:
    """Bytes that this process has asked for by read()."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def tokens_read(monkeypatch) -> list[int]:
    """The bytes of each read of a token file."""
    counts: list[int] = []
    plain = os.pread

    def pread(file, wanted, offset):
        data = plain(file, wanted, offset)
        counts.append(len(data))
        return data

    monkeypatch.setattr("dash_dist.data.corpus.os.pread", pread)
    return counts


@pytest.fixture
def amplified(tmp_path) -> DataConfig:
    """jsonl_read_amplification.py: long lines, of which every row read all. Prepared."""
    lines = ((f"word{i} " * 4000) for i in range(128))
    (tmp_path / "amp.jsonl").write_bytes(json_lines(*lines))
    config = files(tmp_path / "amp.jsonl", cache=tmp_path / "cache")
    build(config)
    return config


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_reading_costs_little_more_than_what_is_used(amplified, tokens_read, batch):
    stream = build(amplified, length=2048, batch=batch)
    count = max(2, 128 // batch)
    stream.next_step()
    tokens_read.clear()
    before = bytes_read()
    for _ in range(count):
        stream.next_step()
    used = count * batch * 2048 * 2  # the tokens take 16 bits
    assert sum(tokens_read) < 1.05 * used + 1000
    assert bytes_read() - before < 1.05 * used + 10_000  # the raw file is not touched


def test_starting_and_resuming_read_neither_the_raw_file_nor_its_tokens(amplified, tokens_read):
    Path(amplified.paths[0]).touch()  # the worst case: samples of the file are read, 256 KiB
    build(amplified)
    before = bytes_read()
    stream = build(amplified, length=2048, batch=8)
    assert bytes_read() - before < 100_000
    steps(stream, 20)
    state = saved(stream)
    tokens_read.clear()
    before = bytes_read()
    resumed, _ = resume(amplified, state, length=2048, batch=8)
    assert tokens_read == []
    resumed.next_step()
    assert sum(tokens_read) < 1.05 * 8 * 2048 * 2 + 1000
    assert bytes_read() - before < 100_000


def test_data_parallel_ranks_read_their_own_rows_alone(amplified, tokens_read):
    stream = build(amplified, length=2048, batch=8, rank=3, size=8)
    steps(stream, 10)
    assert sum(tokens_read) < 1.05 * 10 * 2048 * 2 + 1000


GOOD = [f"{i:02d} alpha beta gamma" for i in range(25)]
BAD = b'{"text": "cut off in the midd\n'


def write_late(path: Path, line: bytes) -> DataConfig:
    """bad_line_ends_run.sh: twelve documents, a line, and twelve more."""
    path.write_bytes(json_lines(*GOOD[:12]) + line + json_lines(*GOOD[13:]))
    return files(path)


def numbers_of(steps: list) -> list[int]:
    """The numbers of the documents in the order in which they begin, of joined rows; the last may be missing."""
    text = "".join(chr(token) for step in steps for row in step for token in row[0])
    return [int(part) for part in re.findall(r"(\d\d) alpha", text)]


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_bad_line_is_skipped_counted_and_named(tmp_path, documents):
    path = tmp_path / "late.jsonl"
    config = write_late(path, BAD).model_copy(update={"documents": documents})
    stream = build(config, length=32, batch=1)
    told = f"{path}: 1 of 25 documents are skipped: {path} line 13: not JSON: "
    assert [sentence[: len(told)] for sentence in stream._corpus.damage] == [told]
    while saved(stream)["sources"][0]["epoch"] < 3:
        stream.next_step()
    epoch = saved(stream)["sources"][0]["epoch"]
    assert stream.skipped_documents in (epoch, epoch + 1)
    resumed, _ = resume(config, saved(stream), length=32, batch=1)
    assert resumed.skipped_documents == stream.skipped_documents
    assert documents_of(config) == [*GOOD[:12], *GOOD[13:]]


def test_a_bad_line_stops_where_that_is_asked(tmp_path):
    path = tmp_path / "late.jsonl"
    config = write_late(path, BAD)
    stopping = config.model_copy(update={"damaged": "stop"})
    named = rf"{path} line 13: not JSON: .*; repair or remove it, or set data\.damaged=skip"
    for cache in (tmp_path / "one", tmp_path / "two"):
        with pytest.raises(ValueError, match=named):
            build(stopping.model_copy(update={"cache": cache}))
        # Also where the tokens were prepared when damage was skipped.
        build(config.model_copy(update={"cache": cache}))
        with pytest.raises(ValueError, match=named):
            build(stopping.model_copy(update={"cache": cache}))
    write_late(path, json_lines(GOOD[12]))
    build(stopping)


@pytest.mark.parametrize("stop", [0, 7, 20])
@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_saved_position_goes_on_after_the_line_is_repaired(tmp_path, stop, documents):
    path = tmp_path / "late.jsonl"
    options = {"length": 32, "batch": 1}
    config = write_late(path, BAD).model_copy(update={"documents": documents})
    stream = build(config, **options)
    before = global_steps([stream], stop)
    state = saved(stream)
    rest = global_steps([stream], 12)
    write_late(path, json_lines(GOOD[12]))
    resumed, notes = resume(config, state, **options)
    assert notes == [f"{path}: documents that could not be read are repaired; all others are as before"]
    after = global_steps([resumed], 12)
    if documents == "joined":
        # All others come in the order in which they would have come: only the repaired one is new.
        seen, repaired, unrepaired = (numbers_of(steps) for steps in (before, before + after, before + rest))
        assert [number for number in repaired if number != 12][: len(unrepaired) - 2] == unrepaired[
            : len(unrepaired) - 2
        ]
        assert 12 not in seen
    states = saved(resumed)
    assert global_steps([resume(config, states, **options)[0]], 2) == global_steps([resumed], 2)
    # A removed line is another matter: all documents behind it move.
    write_late(path, b"")
    with pytest.raises(ValueError, match="had 25 documents at the checkpoint and has 24"):
        resume(config, state, **options)


def test_several_sources_name_the_one_with_damage(tmp_path):
    write_late(tmp_path / "late.jsonl", BAD)
    (tmp_path / "fine.jsonl").write_bytes(json_lines(*GOOD))
    config = DataConfig(
        sources=[
            {"paths": str(tmp_path / "fine.jsonl"), "label": "fine"},
            {"paths": str(tmp_path / "late.jsonl"), "label": "late"},
        ]
    )
    stream = build(config)
    (told,) = stream._corpus.damage
    assert told.startswith("late: 1 of 25 documents")
    steps(stream, 5)
    state = saved(stream)
    write_late(tmp_path / "late.jsonl", json_lines(GOOD[12]))
    resumed, notes = resume(config, state)
    assert notes == ["late: documents that could not be read are repaired; all others are as before"]
    assert json.dumps(saved(resumed)["waiting"]) == json.dumps(state["waiting"])

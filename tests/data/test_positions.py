"""The position in the data: a run goes on exactly after any stop, and says so where the data has changed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dash_dist.config.data import DataConfig
from dash_dist.data.tokenizer import ByteTokenizer
from tests.data.data_streams import (
    FORMATS,
    build,
    build_ranks,
    global_steps,
    join_all,
    json_lines,
    resume,
    saved,
    text_of,
)


@pytest.mark.parametrize("cut", [None, 15])
@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_run_that_is_stopped_after_every_step(corpus, documents, cut):
    config = corpus("jsonl", documents=documents, cut_documents=cut)
    expected = global_steps([build(config)], 12)
    state = saved(build(config))
    for number, rows in enumerate(expected):
        size, micro = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)][number % 5]
        ranks = build_ranks(config, size, micro=micro if documents == "joined" else 1)
        for rank in ranks:
            assert rank.load_state_dict(state) == []
        assert global_steps(ranks, 1) == [rows]
        state = saved(ranks[-1])
    assert state["sources"][0]["epoch"] >= 1


@pytest.mark.parametrize(("shards", "row_group"), [(3, 7), (1, 40)])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_hub_datasets_resume_exactly_at_every_step(tmp_path, shards, row_group, batch):
    """hub_resume_two_rows.py: several rows of the global batch at one rank."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for shard in range(shards):
        texts = [f"{shard}-{row:02d} " * 4 for row in range(40)]
        pq.write_table(pa.table({"text": texts}), folder / f"train-{shard}.parquet", row_group_size=row_group)
    config = DataConfig(source="hub", name=str(folder))
    options = {"length": 64, "batch": batch}
    stream = build(config, **options)
    states, expected = [], []
    for _ in range(120 // batch):
        states.append(saved(stream))
        expected += global_steps([stream], 1)
    another = build(config, **options)
    for step in range(len(states)):
        following = expected[step : step + 2]
        # A new run at some, which costs more; any stream can take any position.
        resumed = build(config, **options) if step % 40 == 1 else another
        assert resumed.load_state_dict(states[step]) == []
        assert global_steps([resumed], len(following)) == following


def test_the_position_stays_small_inside_a_long_document(corpus):
    stream = build(corpus("text", ["x" * 3_000_000, "y" * 3_000_000]), length=1024, batch=2)
    for _ in range(50):
        stream.next_step()
    assert len(json.dumps(stream.state_dict())) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shuffle_seed": 1}, "shuffle_seed 0, this run has 1"),
        ({"documents": "separate"}, "documents joined, this run has separate"),
        ({"special_tokens": True}, "special_tokens False, this run has True"),
        ({}, "tokenizer bytes, this run has other"),
    ],
)
def test_a_position_in_another_order_is_refused(corpus, change, message):
    config = corpus("text")
    state = saved(build(config))
    tokenizer = ByteTokenizer()
    if not change:
        tokenizer.fingerprint = "other"
    with pytest.raises(ValueError, match=message):
        resume(config.model_copy(update=change), state, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"shuffle_seed": 1}, "data.shuffle_seed was 0 and is 1: the documents are read from the beginning"),
        ({"documents": "separate"}, "data.documents was joined and is separate: the documents are read from the"),
    ],
)
def test_a_new_stage_may_read_in_another_order(corpus, change, note):
    config = corpus("text")
    stream = build(config)
    stream.next_step()
    config = config.model_copy(update=change)
    begun = build(config)
    (found,) = begun.load_state_dict(saved(stream), new_stage=True)
    assert found.startswith(note)
    assert global_steps([begun], 2) == global_steps([build(config)], 2)


def test_a_new_stage_continues_the_sources_that_both_read(corpus):
    common, other = corpus("text"), corpus("jsonl")
    stream = build(common)
    expected = global_steps([stream], 2)[1]
    alone = build(common)
    alone.next_step()
    state = saved(alone)
    same = build(common)
    assert same.load_state_dict(state, new_stage=True) == []
    assert global_steps([same], 1) == [expected]
    elsewhere = build(other)
    notes = elsewhere.load_state_dict(state, new_stage=True)
    assert [note.split(" ", 2)[-1].rsplit(" ", 2)[-2:] for note in notes] == [["is", "new"], ["longer", "read"]]
    assert global_steps([elsewhere], 1) == global_steps([build(other)], 1)


def test_a_position_of_an_earlier_version_is_refused(corpus):
    config = corpus("text")
    with pytest.raises(ValueError, match="is of version 1, and this one reads 2: continue with the version of dash"):
        resume(config, {"rows": {}})


def test_a_moved_corpus_is_the_same_corpus(corpus, tmp_path):
    config = corpus("jsonl")
    stream = build(config)
    stream.next_step()
    state = saved(stream)
    (tmp_path / "jsonl").rename(tmp_path / "elsewhere")
    resumed, notes = resume(config.model_copy(update={"paths": (str(tmp_path / "elsewhere"),)}), state)
    assert notes == []
    assert global_steps([resumed], 3) == global_steps([stream], 3)


@pytest.mark.parametrize("file_format", FORMATS)
def test_changed_documents_are_refused_or_accepted_and_told(corpus, tmp_path, file_format):
    config = corpus(file_format, [f"document {i:02d}" for i in range(12)])
    stream = build(config)
    first = join_all(stream.next_step()[:1])
    state = saved(stream)
    path = min((tmp_path / file_format).iterdir())
    if path.suffix == ".parquet":
        table = pa.table({"text": ["document xx", *[f"document {i:02d}" for i in range(1, 4)]], "id": range(4)})
        pq.write_table(table, path, row_group_size=3)
    else:
        path.write_bytes(path.read_bytes().replace(b"document 00", b"document xx"))
    title = config.all_sources[0].title
    with pytest.raises(ValueError, match=rf"1 documents of {title} have changed .* \(the first is number 0\): restore"):
        resume(config, state)
    accepting = config.model_copy(update={"accept_changes": True})
    resumed, notes = resume(accepting, state)
    assert notes == [
        f"1 documents of {title} have changed since the checkpoint (the first is number 0): "
        "continuing with them as they are now"
    ]
    text = text_of(resumed, 6)
    assert "document xx" in text
    assert "document 00" not in text
    for number in range(1, 12):
        assert f"{number:02d}" in text
    assert first


def test_another_number_of_documents_begins_a_new_epoch(corpus, tmp_path):
    config = corpus("jsonl", [f"{i:02d}" for i in range(8)])
    stream = build(config, batch=1)
    stream.next_step()
    state = saved(stream)
    (tmp_path / "jsonl" / "9.jsonl").write_bytes(json_lines("08", "09"))
    with pytest.raises(ValueError, match=r"had 8 documents at the checkpoint and has 10: restore them, or set data"):
        resume(config, state, batch=1)
    resumed, notes = resume(config.model_copy(update={"accept_changes": True}), state, batch=1)
    assert notes == [f"{config.paths[0]} had 8 documents at the checkpoint and has 10: a new epoch begins"]
    assert saved(resumed)["sources"][0]["epoch"] == 1
    assert sorted(text_of(resumed, 2)[:20]) == sorted("".join(f"{i:02d}" for i in range(10)))


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_document_that_became_shorter_than_what_was_read_of_it_is_left(corpus, tmp_path, documents):
    config = corpus("text", ["a" * 200, "b" * 5], documents=documents, shuffle_seed=None, accept_changes=True)
    stream = build(config, batch=1)
    for _ in range(6):
        stream.next_step()
    state = saved(stream)
    assert state["waiting"][0] == [0, 0, 96]
    (tmp_path / "text" / "000.txt").write_text("A" * 90)
    resumed, notes = resume(config, state, batch=1)
    assert "1 documents of" in notes[0]
    (batch,) = resumed.next_step()
    assert batch.tokens[0, :5].tolist() == [ord("b")] * 5

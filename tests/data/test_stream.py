"""Batches and the position in the data: the same global batches whatever the ranks, and after any stop."""

import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dash_dist.config.data import DataConfig
from dash_dist.data.tokenizer import ByteTokenizer
from tests.data.chat_templates import lines_of
from tests.data.data_streams import (
    CHUNK_SIZE,
    END,
    TEXTS,
    build,
    build_ranks,
    files,
    global_steps,
    inputs,
    join_all,
    json_lines,
    resume,
    saved,
    steps,
    text_of,
    tokens_in_order,
)

FORMATS = ("text", "jsonl", "parquet", "hub")


@pytest.mark.parametrize("file_format", FORMATS)
def test_documents_are_read_in_the_order_of_the_files_over_and_over(corpus, file_format):
    stream = build(corpus(file_format, shuffle_seed=None))
    windows = steps(stream, 30)
    rows = torch.cat(windows)
    expected, _ = tokens_in_order([[text.encode() for text in TEXTS]], [1.0], rows[:, :-1].numel(), seed=None)
    assert rows[:, :-1].flatten().tolist() == expected[: rows[:, :-1].numel()]
    for before, after in itertools.pairwise(rows):
        assert before[-1] == after[0]
    assert stream.progress.popitem()[1].epochs > 2


def test_batch_shapes_and_dtypes(corpus):
    batches = build(corpus("text"), length=8, batch=4, size=1, micro=2).next_step()
    assert len(batches) == 2
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (2, 8)
        assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert batch.loss_mask.dtype == torch.bool
        assert bool(batch.loss_mask.all())
        assert batch.cu_seqlens is None
        assert batch.document_length == 8


def test_separate_documents_come_with_their_borders(corpus):
    config = corpus("text", ["a" * 5, "b" * 4, "c" * 20], documents="separate", shuffle_seed=None, lookahead=2)
    first, second = build(config, batch=2).next_step()
    assert first.tokens.shape == first.labels.shape == first.loss_mask.shape == (1, 16)
    assert (first.cu_seqlens.dtype, first.cu_seqlens.device.type) == (torch.int32, "cpu")
    # The third, of 20, is longer than a sequence: its beginning fills the rest.
    assert first.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert first.loss_mask[0].nonzero().flatten().tolist() == [*range(5), *range(8, 16)]
    assert first.labels[0, [4, 11, 15]].tolist() == [END, END, ord("c")]
    assert first.document_length == (8 * 8 + 4 * 4 + 4 * 4) / 16
    assert second.tokens[0].tolist() == [ord("c")] * 16


@pytest.mark.parametrize(
    ("long_documents", "read"), [("split", {"a": 5, "b": 17, "c": 16, "d": 40}), ("drop", {"a": 5, "c": 16})]
)
def test_documents_longer_than_a_sequence_are_split_or_dropped(corpus, long_documents, read):
    texts = [letter * length for letter, length in (("a", 5), ("b", 17), ("c", 16), ("d", 40))]
    config = corpus("jsonl", texts, documents="separate", long_documents=long_documents, lookahead=1)
    stream = build(config, batch=1)
    counts: Counter[str] = Counter()
    while saved(stream)["sources"][0]["epoch"] < 5:
        (batch,) = stream.next_step()
        counts.update(ByteTokenizer().decode(batch.tokens[batch.loss_mask]))
    assert counts.keys() == read.keys()
    for letter, length in read.items():
        assert counts[letter] / 5 == pytest.approx(length, rel=0.3)
    assert stream.skipped_documents == (0 if long_documents == "split" else 10)


def has_text(source: tuple[str, list[str], int]) -> bool:
    # Named: hypothesis parses the source of a lambda, which Python 3.11.7 can fail (python/cpython#106905).
    return any(source[1])


# Sources of JSON Lines, text files or tables, the documents of each, and their suffix.
TEXT_KINDS = ["text", "text.gz", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]
ROW_KINDS = ["completions.jsonl", "completions.parquet", "messages.jsonl", "messages.parquet"]


def sources_of(kinds: list[str]) -> st.SearchStrategy:
    return st.lists(
        st.tuples(
            st.sampled_from(kinds),
            st.lists(
                st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40), min_size=1, max_size=9
            ),
            st.integers(1, 4),
        ).filter(has_text),
        min_size=1,
        max_size=3,
    )


LAYOUTS = st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (4, 4, 1), (6, 2, 3), (4, 1, 4)])
"""Global batch, data-parallel size, micro-batch."""


def write_source(folder: Path, kind: str, texts: list[str], per_file: int) -> None:
    """Write the texts below `folder`, in the order of their files' names; several a file where the format can."""
    folder.mkdir()

    def write(name: str, content: bytes) -> None:
        if kind.endswith(".gz"):
            content = gzip.compress(content)
        if kind.endswith(".zst"):
            content = pa.Codec("zstd").compress(content, asbytes=True)
        (folder / name).write_bytes(content)

    suffix = kind.removeprefix("text") if kind.startswith("text") else f".{kind}"
    for part in range(0, len(texts), 1 if kind.startswith("text") else per_file):
        rows, name = texts[part : part + per_file], f"{part:03d}{suffix}"
        if kind in ROW_KINDS:
            write_rows(folder / name.replace(kind, kind.partition(".")[2]), kind, rows)
        elif kind.startswith("text"):
            write(name, texts[part].encode())
        elif kind.startswith("jsonl"):
            write(name, json_lines(*rows))
        else:
            pq.write_table(pa.table({"text": rows}), folder / name, row_group_size=2)


def write_rows(path: Path, kind: str, texts: list[str]) -> None:
    """Write rows whose first half is a prompt; an empty text is an empty row."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    if kind.startswith("completions"):
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in halves]
    else:
        turns = [list(zip(("user", "assistant"), half, strict=True)) if any(half) else [] for half in halves]
        rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in turns]
    if path.suffix == ".jsonl":
        path.write_bytes(lines_of(*rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def config_of(root: Path, sources: list, **options) -> DataConfig:
    for number, (kind, texts, per_file) in enumerate(sources):
        write_source(root / f"{number}", kind, texts, per_file)
    (root / "contents.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    given: list[dict] = [{"paths": [str(root / f"{number}")]} for number in range(len(sources))]
    for one, (kind, *_) in zip(given, sources, strict=True):
        if kind in ROW_KINDS:
            one["rows"] = kind.partition(".")[0]
        if kind.startswith("messages"):
            one["chat_template"] = root / "contents.jinja"
    if len(given) == 1:
        return DataConfig(source="files", **given[0], **options)
    return DataConfig(sources=[{**one, "weight": number + 1} for number, one in enumerate(given)], **options)


def bytes_of(sources: list) -> list[list[bytes]]:
    """The documents as tokens: those of UTF-8 without a byte order mark at the start of a file."""

    def encoded(kind: str, text: str) -> bytes:
        return (text.removeprefix("\ufeff") if kind.startswith("text") else text).encode()

    return [[encoded(kind, text) for text in texts] for kind, texts, _ in sources]


def counts_of(sources: list) -> list[list[list[bool]]]:
    """Which tokens of the documents count in the loss, the end of the document included."""

    def counts(kind: str, text: str) -> list[bool]:
        size, prompt = len(text.encode()), len(text[: len(text) // 2].encode())
        if kind not in ROW_KINDS:
            return [True] * (size + 1)
        return [False] * prompt + [True] * (size - prompt) + [kind.startswith("completions")]

    # A mark at the start of a file is not part of its text.
    return [
        [counts(kind, text.removeprefix("\ufeff") if kind.startswith("text") else text) for text in texts]
        for kind, texts, _ in sources
    ]


def windows_that_count(counts: list[bool], start: int, size: int, number: int) -> list[int]:
    """Where the global batches of `size` tokens begin that are not passed over."""
    found: list[int] = []
    while len(found) < number:
        assert start + size < len(counts)
        if any(counts[start + 1 : start + size + 1]):
            found.append(start)
        start += size
    return found


MANY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@MANY
@given(
    sources=sources_of([*TEXT_KINDS, *ROW_KINDS]),
    layout=LAYOUTS,
    other=LAYOUTS,
    chunks=st.integers(1, 5),
    documents=st.sampled_from(["joined", "separate"]),
    seed=st.sampled_from([None, 0, 2**63]),
    data=st.data(),
)
def test_batches_are_a_pure_function_of_the_configuration(sources, layout, other, chunks, documents, seed, data):
    if any(not any(texts) for texts in bytes_of(sources)):
        return
    (batch, size, micro), length, count = layout, chunks * CHUNK_SIZE, 6
    micro = micro if documents == "joined" else 1
    options = {"length": length, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), sources, documents=documents, shuffle_seed=seed)
        alone = build(config, **options)
        states, whole = [saved(alone)], []
        for _ in range(count):
            whole += global_steps([alone], 1)
            states.append(saved(alone))
        ranks = build_ranks(config, size, micro=micro, **options)
        assert global_steps(ranks, count) == whole
        assert [saved(rank) for rank in ranks] == [states[-1]] * size

        stop = data.draw(st.integers(0, count))
        for ranks in (build_ranks(config, size, micro=micro, **options), build_ranks(config, 1, **options)):
            assert [rank.load_state_dict(states[stop]) for rank in ranks] == [[]] * len(ranks)
            assert [saved(rank) for rank in ranks] == [states[stop]] * len(ranks)
            assert global_steps(ranks, count - stop) == whole[stop:]

        if documents == "joined":
            shares = [(number + 1) / sum(range(1, len(sources) + 1)) for number in range(len(sources))]
            other_batch, other_length = other[0], length + 3
            size, other_size = batch * length, other_batch * other_length
            expected, drawn = tokens_in_order(
                bytes_of(sources), shares, (size + other_size) * count * 10 + 1000, seed=seed
            )
            counts_in = counts_of(sources)
            counts = [one for source, _, document in drawn for one in counts_in[source][document]]
            starts = windows_that_count(counts, 0, size, count)
            for step, start in zip(whole, starts, strict=True):
                rows = [[token for row in step for token in row[part]] for part in range(3)]
                assert rows[0] == expected[start : start + size]
                assert rows[1][-1] == expected[start + size]
                assert rows[2] == counts[start + 1 : start + size + 1]
            # Other sizes go on with the next unread token.
            resumed, notes = resume(config, states[stop], batch=other_batch, length=other_length)
            assert len(notes) == 1 + (batch != other_batch)
            starts = windows_that_count(counts, starts[stop - 1] + size if stop else 0, other_size, count)
            assert inputs(resumed, count) == [
                token for start in starts for token in expected[start : start + other_size]
            ]


@MANY
@given(sources=sources_of(TEXT_KINDS), batch=st.integers(1, 3), documents=st.sampled_from(["joined", "separate"]))
def test_every_document_is_read_once_in_each_epoch(sources, batch, documents):
    # Numbered, so that no two are equal.
    sources = [
        (kind, [f"{number}.{i}.{len(text)}" for i, text in enumerate(texts)], per_file)
        for number, (kind, texts, per_file) in enumerate(sources)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), sources, documents=documents)
        stream = build(config, length=CHUNK_SIZE * 4, batch=batch)
        read: Counter[str] = Counter()
        text = ""
        while min(one["epoch"] for one in saved(stream)["sources"]) < 3:
            for tokens, labels, mask, _ in (row for step in global_steps([stream], 1) for row in step):
                if documents == "joined":
                    text += "".join(chr(token) for token in tokens)
                else:
                    # A document of at most 16 tokens is in one sequence.
                    pairs = zip(tokens, labels, mask, strict=True)
                    text += "".join(chr(t) + chr(END) * (label == END) for t, label, real in pairs if real)
        read.update(text.split(chr(END))[:-1])
        waiting = Counter((source, document) for source, document, _ in saved(stream)["waiting"])
        for number, (_, texts, _) in enumerate(sources):
            state = saved(stream)["sources"][number]
            drawn = state["epoch"] * len(texts) + state["place"]
            counts = {own: read[own] + waiting[number, i] for i, own in enumerate(texts)}
            # Drawn so often, and used or waiting; the one that the last label is from is both.
            assert all(count - state["epoch"] in (0, 1, 2) for count in counts.values())
            assert sum(counts.values()) - drawn in (0, 1)


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_run_that_is_stopped_after_every_step(corpus, documents):
    config = corpus("jsonl", documents=documents)
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


def test_shuffling_reorders_the_documents_of_each_epoch(corpus):
    texts = [chr(ord("a") + i) for i in range(20)]
    stream = build(corpus("jsonl", texts, shuffle_seed=3), length=40, batch=1)
    first, second = text_of(stream, 1), text_of(stream, 1)
    assert sorted(first) == sorted(second) == texts
    assert len({first, second, "".join(texts)}) == 3


def test_the_position_stays_small_inside_a_long_document(corpus):
    stream = build(corpus("text", ["x" * 3_000_000, "y" * 3_000_000]), length=1024, batch=2)
    for _ in range(50):
        stream.next_step()
    assert len(json.dumps(stream.state_dict())) < 1000


@pytest.mark.slow
def test_batches_do_not_depend_on_the_hash_seed(corpus):
    config = corpus("text", shuffle_seed=1)
    script = (
        "import sys, json; from dash_dist.config.data import DataConfig\n"
        "from dash_dist.data.stream import *\nfrom dash_dist.data.tokenizer import *\n"
        "s = build_data_stream(DataConfig.model_validate_json(sys.argv[1]), tokenizer=ByteTokenizer(),\n"
        "    sequence_length=16, global_batch_size=2, dp_rank=0, dp_size=1, micro_batch_size=2, chunk_size=16)\n"
        "b = [s.next_step()[0].tokens.tolist() for _ in range(5)]; print(json.dumps([b, s.state_dict()]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script, config.model_dump_json()],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert json.loads(outputs[0]) == json.loads(outputs[1])


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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 6, "size": 2, "micro": 2}, "6 is not a multiple .* 2 x 2: use 8"),
        ({"rank": 2, "size": 2}, r"dp_rank 2 is not in \[0, dp_size=2\)"),
        ({"length": 0}, "sequence_length is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(corpus, sizes, message):
    with pytest.raises(ValueError, match=message):
        build(corpus("text"), **sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"micro": 2}, "set training.micro_batch_size to 1, or data.documents to joined"),
        ({"length": 18}, f"18 is not a multiple of attention.chunk_size = {CHUNK_SIZE}, .* to 20"),
    ],
)
def test_sizes_that_separate_documents_cannot_have_are_refused(corpus, sizes, message):
    with pytest.raises(ValueError, match=message):
        build(corpus("text", documents="separate"), **sizes)


def test_no_documents_are_needed_beyond_one(tmp_path):
    """Fewer documents than rows were refused once."""
    (tmp_path / "a.txt").write_text("abc")
    ranks = build_ranks(files(tmp_path), 4, batch=4)
    rows = [row[0] for row in global_steps(ranks, 1)[0]]
    assert [token for row in rows for token in row] == ([*b"abc", END] * 16)[:64]

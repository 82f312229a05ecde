"""Batches: a pure function of the configuration, the same global batches whatever the ranks."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dash_dist.data.tokenizer import ByteTokenizer
from tests.data.data_streams import (
    CHUNK_SIZE,
    END,
    FORMATS,
    TEXTS,
    build,
    build_ranks,
    files,
    global_steps,
    inputs,
    resume,
    saved,
    steps,
    text_of,
    tokens_in_order,
)
from tests.data.stream_sources import (
    LAYOUTS,
    ROW_KINDS,
    TEXT_KINDS,
    bytes_of,
    config_of,
    counts_of,
    sources_of,
    windows_that_count,
)


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


MANY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@MANY
@given(
    sources=sources_of([*TEXT_KINDS, *ROW_KINDS]),
    layout=LAYOUTS,
    other=LAYOUTS,
    chunks=st.integers(1, 5),
    documents=st.sampled_from(["joined", "separate"]),
    order=st.sampled_from([(None, None), (0, None), (2**63, None), (0, 2), (2**63, 7), (0, 12)]),
    data=st.data(),
)
def test_batches_are_a_pure_function_of_the_configuration(sources, layout, other, chunks, documents, order, data):
    if any(not any(texts) for texts in bytes_of(sources)):
        return
    (batch, size, micro), length, count = layout, chunks * CHUNK_SIZE, 6
    seed, cut = order
    micro = micro if documents == "joined" else 1
    options = {"length": length, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), sources, documents=documents, shuffle_seed=seed, cut_documents=cut)
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
                bytes_of(sources), shares, (size + other_size) * count * 10 + 1000, seed=seed, cut=cut
            )
            counts_in = counts_of(sources)
            counts = [one for source, document, start, stop in drawn for one in counts_in[source][document][start:stop]]
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


def test_shuffling_reorders_the_documents_of_each_epoch(corpus):
    texts = [chr(ord("a") + i) for i in range(20)]
    stream = build(corpus("jsonl", texts, shuffle_seed=3), length=40, batch=1)
    first, second = text_of(stream, 1), text_of(stream, 1)
    assert sorted(first) == sorted(second) == texts
    assert len({first, second, "".join(texts)}) == 3


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

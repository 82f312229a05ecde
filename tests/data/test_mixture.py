"""Shares of sources by tokens, and the documents of one source in epochs."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_dist.config.data import DataConfig
from dash_dist.data.mixture import Mixture, SourceCursor, shares_of
from tests.data.data_streams import END, build, files, inputs, json_lines, resume, saved, source_of, steps


def lengths_of(rng: np.random.Generator, documents: int) -> np.ndarray:
    """Varied: a document of 2,000 tokens among some of 2."""
    return np.clip(rng.lognormal(4, 1, size=documents), 2, 2000).astype(np.int32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([{"weight": 1}, {"weight": 2}, {"weight": 7}], lambda tokens: [0.1, 0.2, 0.7]),
        ([{"epochs": 1}, {"epochs": 4}, {"epochs": 0.5}], lambda tokens: tokens * [1, 4, 0.5]),
        ([{}, {}, {}], lambda tokens: tokens),
        (3.0, lambda tokens: tokens ** (1 / 3)),
    ],
)
def test_shares_by_tokens_hold_in_every_window_of_steps(options, expected):
    rng = np.random.default_rng(0)
    sources = [source_of(lengths_of(rng, documents)) for documents in (40, 4000, 900)]
    temperature, options = (options, [{}, {}, {}]) if isinstance(options, float) else (None, options)
    config = DataConfig(
        sources=[{"paths": f"{i}", **given} for i, given in enumerate(options)], temperature=temperature
    )
    corpus = SimpleNamespace(sources=dict(enumerate(sources)))
    amounts = np.array(expected(np.array([float(source.record.tokens) for source in sources])))
    wanted = amounts / amounts.sum()
    shares = shares_of(config, corpus)
    np.testing.assert_allclose(shares, wanted)

    mixture = Mixture([SourceCursor(source, seed=0, longest=None) for source in sources], shares)
    step = 2048
    count = 2500
    by_step = np.zeros((count + 1, 3))
    total = 0
    while total < count * step:
        one = mixture.next_document()
        by_step[total // step, one.source] += one.length
        total += one.length
    by_step = by_step[:count]
    for start in range(0, count - 1000, 100):
        window = by_step[start : start + 1000].sum(axis=0)
        np.testing.assert_allclose(window / window.sum(), wanted, atol=0.005)


@settings(deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(2, 300), min_size=1, max_size=20), min_size=2, max_size=4),
    data=st.data(),
)
def test_no_source_is_ever_further_from_its_share_than_a_document_of_each(lengths, data):
    amounts = data.draw(st.lists(st.floats(0.01, 10), min_size=len(lengths), max_size=len(lengths)))
    shares = [amount / sum(amounts) for amount in amounts]
    cursors = [SourceCursor(source_of(own), seed=1, longest=None) for own in lengths]
    mixture = Mixture(cursors, shares)
    longest = sum(max(own) for own in lengths)
    for _ in range(200):
        mixture.next_document()
        total = sum(cursor.drawn for cursor in cursors)
        for share, cursor in zip(shares, cursors, strict=True):
            assert abs(cursor.drawn - share * total) <= longest


def test_each_epoch_of_a_source_has_each_document_once():
    lengths = np.arange(2, 3002)
    lengths[[5, 700]] = 0  # without text
    cursor = SourceCursor(source_of(lengths), seed=2, longest=2500)
    fits = set(np.flatnonzero((lengths > 1) & (lengths <= 2500)))
    orders = []
    for epoch in range(3):
        drawn = [cursor.draw()[0] for _ in range(len(fits))]
        assert set(drawn) == fits
        orders.append(tuple(drawn))
        if epoch < 2:
            assert cursor.epoch == epoch
    assert len(set(orders)) == 3
    assert cursor.skipped in (4, 5, 6)  # those behind the last drawn one are not passed over yet
    assert cursor.dropped > 2 * (3000 - len(fits) - 2)


def test_a_source_without_a_document_that_can_be_read_is_refused():
    with pytest.raises(ValueError, match=r"data\.paths=\[x\] has no document that fits .* set it to split"):
        SourceCursor(source_of([0, 50, 60]), seed=0, longest=40)
    with pytest.raises(ValueError, match=r"data\.paths=\[x\] has no document of at least 2 tokens"):
        SourceCursor(source_of([0, 1, 1]), seed=0, longest=None)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_files_of_a_source_get_shares_by_their_documents_whatever_the_batch(tmp_path, batch):
    """files_and_rows_distort_mixture.py: 5 and 500 documents of equal length."""
    for name, documents in (("a", 5), ("b", 500)):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(*[name * 500] * documents))
    config = files(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    stream = build(config, length=501, batch=batch)
    tokens = inputs(stream, 505 * 2 // batch)
    counts = collections.Counter(tokens)
    used = counts[ord("a")] + counts[ord("b")]
    assert counts[ord("a")] / used == pytest.approx(5 / 505, abs=2 / (505 * 2))


def test_progress_counts_tokens_and_epochs_of_each_source(tmp_path):
    for name, documents in (("a", 10), ("b", 30)):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(*[f"{name}{i:03d}" * 5 for i in range(documents)]))
    sources = [
        {"paths": str(tmp_path / "a.jsonl"), "weight": 3, "label": "small"},
        {"paths": str(tmp_path / "b.jsonl"), "weight": 1},
    ]
    config = DataConfig(sources=sources)
    stream = build(config, length=21, batch=4)
    rows = [row for window in steps(stream, 20) for row in window[:, :-1].tolist()]
    progress = stream.progress
    assert list(progress) == ["small", str(tmp_path / "b.jsonl")]
    read = collections.Counter(row[0] for row in rows)  # every row is one document
    assert [one.tokens for one in progress.values()] == [read[ord("a")] * 21, read[ord("b")] * 21]
    assert sum(read.values()) == 80
    assert read[ord("a")] == 60
    # The next document, which holds the last label, is drawn too.
    drawn = [row["drawn"] // 21 for row in saved(stream)["sources"]]
    assert [one.epochs for one in progress.values()] == [drawn[0] / 10, drawn[1] / 30]
    assert sum(drawn) == 81
    resumed, notes = resume(config, saved(stream), length=21, batch=4)
    assert notes == []
    assert resumed.progress == progress
    assert END in rows[0]


def test_sources_that_come_and_go_and_other_shares_are_told(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(*[name * 15] * 50))

    def mixed(**weights: float) -> DataConfig:
        return DataConfig(
            sources=[
                {"paths": str(tmp_path / f"{name}.jsonl"), "weight": weight, "label": name}
                for name, weight in weights.items()
            ]
        )

    stream = build(mixed(a=1, b=1), batch=2)
    steps(stream, 25)
    state = saved(stream)
    resumed, notes = resume(mixed(b=1, c=3), state, batch=2)
    assert notes == ["data.sources: c is new", "data.sources: a is no longer read"]
    counts = collections.Counter(inputs(resumed, 50))
    # The deficit of the new source since the start of training is not made up for.
    assert counts[ord("c")] / (counts[ord("b")] + counts[ord("c")]) == pytest.approx(0.75, abs=0.02)
    assert resumed.progress["b"].tokens > state["sources"][1]["tokens"]


def test_weights_of_lengths_are_part_of_the_shares_and_of_the_epochs(tmp_path):
    texts = ["a" * 9] * 40 + ["b" * 99] * 10
    for name in "xy":
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(*texts))
    weighted = {"paths": str(tmp_path / "x.jsonl"), "length_weights": {50: 3}}
    sources = [weighted, {"paths": str(tmp_path / "y.jsonl")}]
    config = DataConfig(sources=sources)
    stream = build(config, length=700, batch=4)  # half of an epoch of both
    assert stream._shares == pytest.approx([3400 / 4800, 1400 / 4800])
    counts = collections.Counter(inputs(stream, 12))
    assert counts[ord("b")] / counts[ord("a")] == pytest.approx((30 + 10) * 99 / ((40 + 40) * 9), rel=0.02)
    epochs = [one.epochs for one in stream.progress.values()]
    assert epochs == pytest.approx([7, 7], abs=0.1)


def test_a_run_with_weights_of_lengths_resumes_exactly_and_tells_of_others(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a.jsonl").write_bytes(json_lines(*(chr(97 + i % 26) * int(rng.integers(1, 60)) for i in range(80))))
    config = files(tmp_path / "a.jsonl", length_weights={20: 0.4, 40: 2.5})
    stream = build(config, length=64, batch=2)
    steps(stream, 17)
    state = saved(stream)
    resumed, notes = resume(config, state, length=64, batch=2)
    assert notes == []
    assert saved(resumed) == state
    assert inputs(resumed, 40) == inputs(stream, 40)

    other = config.model_copy(update={"length_weights": {20: 0.4}})
    resumed, notes = resume(other, state, length=64, batch=2)
    assert notes[0] == (
        f"length_weights of {config.paths[0]} were {{'20': 0.4, '40': 2.5}} and are {{'20': 0.4}}: a new epoch begins"
    )
    assert saved(resumed)["sources"][0]["epoch"] == state["sources"][0]["epoch"] + 1
    _, notes = resume(config.model_copy(update={"length_weights": {}}), state, length=64, batch=2)
    assert "are {}: a new epoch begins" in notes[0]
    del state["sources"][0]["length_weights"]  # as earlier versions save it
    assert "were {} and are" in resume(config, state, length=64, batch=2)[1][0]


def test_weights_that_leave_epochs_without_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines("a" * 9, "b" * 9, "c" * 9))
    stream = build(files(tmp_path / "a.jsonl", length_weights={2: 0.1}), length=10, batch=1)
    text = inputs(stream, 30)
    assert collections.Counter(text)[END] == 30
    assert {text.count(ord(letter)) for letter in "abc"} == {90}
    assert saved(stream)["sources"][0]["epoch"] >= 99

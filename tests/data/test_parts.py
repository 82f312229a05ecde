"""Long documents cut into parts that are shuffled as documents are."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_dist.config.data import DataConfig
from dash_dist.data.mixture import SourceCursor, Waiting
from dash_dist.data.order import DocumentOrder
from dash_dist.data.packing import JoinedPacker, Packer, Piece, SeparatePacker
from dash_dist.data.parts import Parts
from dash_dist.data.stream import DataStream
from tests.data.data_streams import (
    END,
    build,
    build_ranks,
    files,
    global_steps,
    inputs,
    json_lines,
    parts_of,
    resume,
    saved,
    source_of,
    steps,
)

ANY = settings(deadline=None, max_examples=100)


@st.composite
def lengths_and_cut(draw: st.DrawFn) -> tuple[list[int], int]:
    """Random lengths, many of them at a border of parts, and at least one that can be read."""
    cut = draw(st.integers(2, 30))
    borders = st.builds(lambda parts, beyond: max(parts * cut + beyond, 0), st.integers(0, 4), st.integers(-2, 2))
    lengths = draw(st.lists(st.one_of(borders, st.integers(0, 200)), min_size=1, max_size=30))
    return [*lengths, draw(st.integers(2, 100))], cut


@ANY
@given(case=lengths_and_cut())
def test_parts_are_those_of_the_reference(case):
    lengths, cut = case
    for given_cut in (cut, None, 10**30):
        parts = Parts(np.array(lengths, dtype=np.int32), given_cut)
        expected = parts_of(lengths, given_cut)
        assert len(parts) == len(expected)
        assert parts.bounds(np.arange(len(parts))).tolist() == [list(one) for one in expected]
        assert parts.lengths_of_documents().tolist() == [lengths[document] for document, _, _ in expected]
        assert parts.shortest() == min(stop - start for _, start, stop in expected if stop - start >= 2)


@pytest.mark.parametrize(
    ("length", "bounds"),
    [
        (8, [(0, 8)]),
        (9, [(0, 9)]),
        (10, [(0, 8), (8, 10)]),
        (16, [(0, 8), (8, 16)]),
        (17, [(0, 8), (8, 17)]),
        (18, [(0, 8), (8, 16), (16, 18)]),
    ],
)
def test_a_last_token_alone_joins_the_part_before(length, bounds):
    parts = Parts(np.array([length]), 8)
    assert parts.bounds(np.arange(len(parts)))[:, 1:].tolist() == [list(one) for one in bounds]


def test_parts_of_huge_documents_are_numbered_and_not_stored():
    longest = 2**31 - 1
    lengths = np.full(100, 3, dtype=np.int32)
    lengths[[20, 70]] = longest
    parts = Parts(lengths, 2)
    assert len(parts) == 98 + 2 * (2**30 - 1)
    assert parts.bounds(np.array([70, len(parts) - 1])).tolist() == [[70, 0, 2], [70, longest - 3, longest]]


@ANY
@given(case=lengths_and_cut(), seed=st.integers(0, 2**63))
def test_every_token_comes_once_an_epoch(case, seed):
    lengths, cut = case
    cursor = SourceCursor(source_of(lengths), seed, longest=None, cut=cut)
    expected = [part for part in parts_of(lengths, cut) if part[2] - part[1] >= 2]
    orders = [[tuple(cursor.draw()) for _ in expected] for _ in range(3)]
    for order in orders:
        assert sorted(order) == sorted(expected)
    assert cursor.drawn == 3 * sum(length for length in lengths if length >= 2)
    assert len(expected) < 8 or orders[0] != orders[1]


def test_parts_of_a_document_are_spread_out():
    cursor = SourceCursor(source_of([5000] * 20 + [9] * 100), 1, longest=None, cut=50)
    drawn = [cursor.draw() for _ in range(20 * 100 + 100)]
    assert cursor.epochs == 1
    assert sum(one.document == two.document for one, two in itertools.pairwise(drawn)) < 200
    for start in range(0, len(drawn), 100):
        assert len({part.document for part in drawn[start : start + 100] if part.document < 20}) >= 15


def test_a_cut_that_no_document_is_longer_than_changes_nothing():
    lengths = np.random.default_rng(0).integers(0, 100, size=3000)
    for weights in ({}, {30: 2.5, 70: 0.4}):
        orders = [DocumentOrder(Parts(lengths, cut), 3, weights) for cut in (None, 99)]
        for epoch in range(3):
            one, other = (order.parts(epoch, 0, order.places(epoch)) for order in orders)
            np.testing.assert_array_equal(one, other)


def pieces_of_an_epoch(packer: Packer) -> list[Piece]:
    """The pieces of the first source, which is followed by another one without end."""
    pieces: list[Piece] = []
    while True:
        plan = packer.plan()
        pieces += [one for one in plan if one.source == 0]
        if all(one.source for one in [*plan, *packer.waiting]):
            return pieces


@ANY
@given(case=lengths_and_cut(), chunks=st.integers(1, 8), lookahead=st.integers(1, 9), separate=st.booleans())
def test_every_token_is_packed_once_and_no_piece_crosses_parts(case, chunks, lookahead, separate):
    lengths, cut = case
    cursor = SourceCursor(source_of(lengths), 0, longest=None, cut=cut)
    expected = [part for part in parts_of(lengths, cut) if part[2] - part[1] >= 2]
    drawn = iter(range(len(expected)))

    def draw() -> Waiting:
        if next(drawn, None) is None:
            return Waiting(1, 0, 4 * chunks + 1)
        part = cursor.draw()
        return Waiting(0, part.document, part.stop, part.start)

    packer: Packer = JoinedPacker(draw, sequence_length=4 * chunks)
    if separate:
        packer = SeparatePacker(
            draw, sequence_length=4 * chunks, chunk_size=4, lookahead=lookahead, buckets=(9,), end_of_document=END
        )
    pieces = pieces_of_an_epoch(packer)
    part_of = {(part[0], token): part for part in expected for token in range(part[1], part[2])}
    for piece in pieces:
        # The label behind a separate piece is of the same part.
        assert part_of[piece.document, piece.start] == part_of[piece.document, piece.stop - 1 + separate]
    read = Counter((one.document, token) for one in pieces for token in range(one.start, one.stop))
    labels = Counter(
        (one.document, token) for one in packer.labels(pieces) for token in range(one.start, one.stop) if not one.source
    )
    if separate:
        # The last token of a part is a label only, the first an input only.
        assert read == Counter((part[0], token) for part in expected for token in range(part[1], part[2] - 1))
    else:
        # The last token of a sequence comes again as the first of the next.
        assert set(read) == set(part_of)
    assert set(labels) <= set(part_of)


def varied(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=length))


def test_a_separate_document_is_computed_part_by_part(tmp_path):
    text = varied(31)  # with its end 32 tokens
    (tmp_path / "a.jsonl").write_bytes(json_lines(text))
    stream = build(files(tmp_path / "a.jsonl", documents="separate", lookahead=1, cut_documents=16), batch=2)
    rows = []
    for batch in stream.next_step():
        assert batch.cu_seqlens.tolist() == [0, 16]
        assert batch.loss_mask[0].tolist() == [True] * 15 + [False]
        rows.append((batch.tokens[0, :15].tolist(), batch.labels[0, :15].tolist()))
    tokens = [*text.encode(), END]
    assert sorted(rows) == sorted([(tokens[:15], tokens[1:16]), (tokens[16:31], tokens[17:])])


def test_weights_of_lengths_are_those_of_the_whole_document():
    lengths = np.array([10, 99, 100, 250, 1000, 5] * 10)
    parts = Parts(lengths, 50)
    order = DocumentOrder(parts, 1, {100: 2.0, 200: 0.5})
    found = [order.parts(epoch, 0, order.places(epoch)) for epoch in range(10)]
    counts = np.bincount(np.concatenate(found), minlength=len(parts))
    whole = parts.lengths_of_documents()
    assert (counts[whole < 100] == 10).all()
    assert (counts[whole == 100] == 20).all()
    assert (counts[whole > 100] == 5).all()


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_a_run_with_weights_and_parts_resumes_exactly_on_other_ranks(tmp_path, documents):
    texts = [varied(random.Random(number).randrange(200), number) for number in range(12)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*texts))
    config = files(tmp_path / "a.jsonl", documents=documents, length_weights={60: 0.4, 120: 2.5}, cut_documents=33)
    stream = build(config, length=32)
    for size in (1, 2, 4) * 10:
        ranks = build_ranks(config, size, length=32)
        for rank in ranks:
            assert rank.load_state_dict(saved(stream)) == []
            assert saved(rank) == saved(stream)
        assert global_steps(ranks, 1) == global_steps([stream], 1)
    assert saved(stream)["sources"][0]["epoch"] >= 1


def unread(stream: DataStream, documents: list[list[int]], cut: int | None) -> list[int]:
    """The tokens that are left of the part that is read at the moment."""
    (_, document, offset, *_), *_ = saved(stream)["waiting"]
    parts = parts_of([len(tokens) for tokens in documents], cut)
    (stop,) = (stop for number, start, stop in parts if number == document and start <= offset < stop)
    return documents[document][offset:stop]


@pytest.mark.parametrize("new_stage", [False, True])
@pytest.mark.parametrize(("before", "after"), [(90, 7), (90, None), (None, 40), (40, 90)])
@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_another_cut_begins_a_new_epoch_after_the_part_that_is_being_read(
    tmp_path, documents, before, after, new_stage
):
    texts = [varied(400, 1), varied(300, 2)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*texts))
    lookahead = {} if documents == "joined" else {"lookahead": 1}
    config = files(tmp_path / "a.jsonl", documents=documents, cut_documents=before, **lookahead)
    stream = build(config, batch=1)
    stream.next_step()
    state = saved(stream)
    tokens = [[*text.encode(), END] for text in texts]
    left = unread(stream, tokens, before)
    assert len(left) > 20
    # The last token of a separate part is a label only.
    left = left if documents == "joined" else left[:-1]

    other = config.model_copy(update={"cut_documents": after})
    resumed = build(other, batch=1)
    assert resumed.load_state_dict(state, new_stage=new_stage) == [
        f"cut_documents of {config.paths[0]} was {before} and is {after}: a new epoch begins"
    ]
    assert saved(resumed)["waiting"] == state["waiting"]
    assert saved(resumed)["sources"][0]["epoch"] == state["sources"][0]["epoch"] + 1
    assert saved(resumed)["sources"][0]["cut_documents"] == after
    read: list[int] = []
    while len(read) < len(left) + 4:
        # The part keeps its end also over further stops, at which the saved cut is the new one.
        again, notes = resume(other, saved(resumed), batch=1)
        assert notes == []
        (batch,) = again.next_step()
        assert global_steps([resumed], 1)[0][0][0] == batch.tokens[0].tolist()
        read += batch.tokens[batch.loss_mask].tolist()
    assert read[: len(left)] == left
    assert read[len(left) :][:4] in [
        tokens[document][start : start + 4] for document, start, _ in parts_of([401, 301], after)
    ]


def test_a_position_of_a_version_without_cuts_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*(varied(90, number) for number in range(9))))
    config = files(tmp_path / "a.jsonl")
    stream = build(config)
    steps(stream, 3)
    state = saved(stream)
    assert all(len(one) == 3 for one in state["waiting"])
    for key in ("cut_documents", "parts"):
        del state["sources"][0][key]
    resumed, notes = resume(config, state)
    assert notes == []
    assert inputs(resumed, 20) == inputs(stream, 20)
    _, (note,) = resume(config.model_copy(update={"cut_documents": 9}), state)
    assert note == f"cut_documents of {config.paths[0]} was None and is 9: a new epoch begins"


def test_documents_that_have_other_parts_begin_a_new_epoch(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = json_lines(varied(50, 1), varied(50, 2))
    path.write_bytes(lines + b"{damaged\n" + lines)
    config = files(path, cut_documents=20)
    stream = build(config, batch=1)
    steps(stream, 8)
    state = saved(stream)
    path.write_bytes(lines + json_lines(varied(100, 3)) + lines)
    resumed, notes = resume(config, state, batch=1)
    assert notes == [
        f"{path}: documents that could not be read are repaired; all others are as before",
        f"documents of {path} had 13 parts and have 17: a new epoch begins",
    ]
    assert saved(resumed)["waiting"] == state["waiting"]
    assert (saved(resumed)["sources"][0]["epoch"], saved(resumed)["sources"][0]["place"]) == (1, 0)


def test_parts_and_not_documents_are_dropped_for_their_length():
    source = source_of([100, 33, 17, 9])
    cursor = SourceCursor(source, 0, longest=17, cut=16)
    drawn = sorted(tuple(cursor.draw()) for _ in range(11))
    assert drawn == sorted(parts_of([100, 33, 17, 9], 16))
    assert cursor.dropped == 0
    cursor = SourceCursor(source, 0, longest=17, cut=30)
    assert {tuple(cursor.draw()) for _ in range(100)} == {(0, 90, 100), (1, 30, 33), (2, 0, 17), (3, 0, 9)}
    assert cursor.dropped > 0
    for lengths, cut in (([100, 40], 20), ([31], 30)):
        with pytest.raises(
            ValueError, match=r"no document that fits into a sequence, and data\.long_documents is drop"
        ):
            SourceCursor(source_of(lengths), 0, longest=17, cut=cut)


def test_shares_hold_within_parts(tmp_path):
    for name, length in (("a", 5000), ("b", 100)):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(*[name * length] * (20000 // length)))
    sources = [{"paths": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 3), ("b", 1))]
    stream = build(DataConfig(sources=sources, cut_documents=50), length=100, batch=4)
    for _ in range(30):
        counts = Counter(inputs(stream, 1))
        assert counts[ord("a")] == pytest.approx(300, abs=100)
    assert [one.epochs > 0 for one in stream.progress.values()] == [True, True]

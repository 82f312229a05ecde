"""Packing alone, over lengths and arrays."""

import copy
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_dist.data.mixture import Waiting
from dash_dist.data.packing import JoinedPacker, PackedSequence, Packer, Piece, SeparatePacker, count_inputs

END = 1_000_000
ANY = settings(deadline=None, max_examples=60)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def documents_of(lengths: Iterable[int]) -> list[np.ndarray]:
    """Documents of these lengths with different tokens, and an end-of-document token behind each."""
    ids = itertools.count()
    return [np.array([*itertools.islice(ids, length), END]) for length in lengths]


def drawing(documents: list[np.ndarray]) -> Callable[[], Waiting]:
    """All documents once. Then StopIteration."""
    numbers = iter(range(len(documents)))

    def draw() -> Waiting:
        number = next(numbers)
        return Waiting(0, number, len(documents[number]))

    return draw


def pack(documents: list[np.ndarray], length: int, chunk_size: int | None = None, **options) -> Packer:
    """Separate documents with a chunk size, joined ones without."""
    if chunk_size is None:
        return JoinedPacker(drawing(documents), sequence_length=length)
    options = {"lookahead": 1, "buckets": (), "end_of_document": END} | options
    return SeparatePacker(drawing(documents), sequence_length=length, chunk_size=chunk_size, **options)


def plans_of(packer: Packer) -> list[list[Piece]]:
    """Until the documents end."""
    plans = []
    while True:
        try:
            plans.append(packer.plan())
        except StopIteration:
            return plans


def fill(packer: Packer, documents: list[np.ndarray], plans: list[list[Piece]]) -> list[PackedSequence]:
    def read(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        tokens = documents[piece.document][piece.start : piece.stop]
        return tokens, np.ones(len(tokens), dtype=bool)

    return [packer.fill(pieces, read) for pieces in plans]


@ANY
@given(lengths=LENGTHS, length=st.integers(1, 50))
def test_joined_sequences_are_the_documents_in_order_and_each_token_is_predicted_once(lengths, length):
    documents = documents_of(lengths)
    expected = np.concatenate(documents)
    count = (len(expected) - 1) // length
    packer = pack(documents, length)
    plans = plans_of(packer)
    sequences = fill(packer, documents, plans)

    assert len(sequences) == count
    tokens = np.concatenate([sequence.tokens for sequence in sequences] or [expected[:0]])
    labels = np.concatenate([sequence.labels for sequence in sequences] or [expected[:0]])
    np.testing.assert_array_equal(tokens, expected[: count * length])
    np.testing.assert_array_equal(labels, expected[1 : count * length + 1])
    assert all(sequence.loss_mask.all() and sequence.cu_seqlens is None for sequence in sequences)
    assert all(count_inputs(plan, length) == {0: length} for plan in plans)


def full(lengths: list[int], chunks: int, chunk_size: int, **options) -> tuple[list[np.ndarray], list[PackedSequence]]:
    """Documents, and sequences until the last document of interest is used up.

    Those behind them are as long as a sequence, so that none is put beside a document of interest.
    """
    documents = documents_of(lengths)
    behind = [np.array([*[-1] * (chunks * chunk_size), END])] * options.get("lookahead", 1)
    packer = pack([*documents, *behind], chunks * chunk_size, chunk_size, **options)
    plans = plans_of(packer)
    return documents, fill(packer, [*documents, *behind], plans)


@ANY
@given(
    lengths=LENGTHS,
    chunks=st.integers(1, 8),
    chunk_size=st.integers(1, 9),
    lookahead=st.integers(1, 12),
    buckets=st.lists(st.integers(1, 40), max_size=3, unique=True).map(sorted),
)
def test_separate_documents_are_padded_to_whole_chunks_and_each_token_is_an_input_once(
    lengths, chunks, chunk_size, lookahead, buckets
):
    documents, sequences = full(lengths, chunks, chunk_size, lookahead=lookahead, buckets=buckets)
    inputs: dict[int, int] = {}  # each to its label
    for sequence in sequences:
        assert sequence.tokens.dtype == sequence.labels.dtype == np.int64
        assert (sequence.loss_mask.dtype, sequence.cu_seqlens.dtype) == (bool, np.int32)
        assert (sequence.cu_seqlens[0], sequence.cu_seqlens[-1]) == (0, chunks * chunk_size)
        assert not (sequence.cu_seqlens % chunk_size).any()
        assert (np.diff(sequence.cu_seqlens) > 0).all()
        spans = list(itertools.pairwise(sequence.cu_seqlens))
        for start, end in spans:
            real = int(sequence.loss_mask[start:end].sum())
            assert sequence.loss_mask[start : start + real].all()
            assert (sequence.tokens[start + real : end] == END).all()
            assert (sequence.labels[start + real : end] == END).all()
            tokens, labels = sequence.tokens[start : start + real], sequence.labels[start : start + real]
            assert END not in tokens
            if not real:  # what is left of the sequence
                assert end == chunks * chunk_size
                continue
            assert end - start - real < chunk_size
            np.testing.assert_array_equal(tokens[1:], labels[:-1])
            pairs = zip(tokens.tolist(), labels.tolist(), strict=True)
            for token, label in pairs:
                if token >= 0:
                    assert token not in inputs
                    inputs[token] = label
    expected = {
        token: label
        for document in documents
        for token, label in zip(document[:-1].tolist(), document[1:].tolist(), strict=True)
    }
    assert inputs == expected


def pieces_of(lengths: list[int], length: int, **options) -> list[list[tuple[int, int, int]]]:
    """Document, start and stop of the pieces of each sequence, of documents with `lengths` tokens before their end."""
    documents = documents_of([*lengths, *[length] * options.get("lookahead", 1)])
    plans = plans_of(pack(documents, length, 4, **options))
    wanted = [[(one.document, one.start, one.stop) for one in plan if one.document < len(lengths)] for plan in plans]
    return [plan for plan in wanted if plan]


def test_the_oldest_document_comes_first_and_the_longest_that_fits_next():
    # 3 and 4 pad to 4, 7 to 8: after the first with 4 of 16, 9 pads to 12 and fits exactly.
    assert pieces_of([3, 7, 4, 9, 16], 16, lookahead=5) == [
        [(0, 0, 3), (3, 0, 9)],
        [(1, 0, 7), (2, 0, 4)],
        [(4, 0, 16)],
    ]
    # Of equally long ones the one that waits longer.
    assert pieces_of([8, 8, 8, 8], 16, lookahead=3) == [[(0, 0, 8), (1, 0, 8)], [(2, 0, 8), (3, 0, 8)]]


def test_a_document_that_does_not_fit_beside_others_is_not_cut():
    assert pieces_of([3, 14, 9], 16, lookahead=1) == [[(0, 0, 3)], [(1, 0, 14)], [(2, 0, 9)]]


def test_a_long_document_fills_whole_sequences_and_its_rest_goes_with_others():
    documents, (first, second, *_) = full([19, 3], 4, 4, lookahead=2)
    assert first.tokens.tolist() == list(range(16))
    assert first.labels.tolist() == list(range(1, 17))  # the label of a piece's last token begins the next piece
    assert first.cu_seqlens.tolist() == [0, 16]
    assert second.tokens.tolist() == [16, 17, 18, END, 19, 20, 21, END] + [END] * 8
    assert second.labels[:8].tolist() == [17, 18, END, END, 20, 21, END, END]
    assert second.loss_mask.tolist() == [True, True, True, False, True, True, True, False] + [False] * 8
    assert second.cu_seqlens.tolist() == [0, 4, 8, 16]
    assert documents[0][19] == END


def test_documents_share_a_sequence_only_within_their_bucket():
    lengths = np.random.default_rng(0).integers(1, 33, size=300).tolist()
    plans = pieces_of(lengths, 32, lookahead=50, buckets=(4, 12))
    bucket = [0 if length <= 4 else 1 if length <= 12 else 2 for length in lengths]
    assert all(len({bucket[document] for document, _, _ in plan}) == 1 for plan in plans)
    assert {len(plan) for plan in plans} != {1}
    together = pieces_of(lengths, 32, lookahead=50)
    assert any(len({bucket[document] for document, _, _ in plan}) > 1 for plan in together)


def wasted(lengths: np.ndarray, length: int, chunk_size: int, lookahead: int) -> float:
    """The part of all sequences beyond the documents with their chunks' padding."""
    numbers = iter(range(len(lengths)))

    def draw() -> Waiting:
        number = next(numbers)
        return Waiting(0, number, int(lengths[number]) + 1)

    packer = SeparatePacker(
        draw, sequence_length=length, chunk_size=chunk_size, lookahead=lookahead, buckets=(), end_of_document=END
    )
    plans = plans_of(packer)
    used = sum(-(-(one.stop - one.start) // chunk_size) * chunk_size for plan in plans for one in plan)
    return 1 - used / (len(plans) * length)


@pytest.mark.parametrize("spread", ["uniform", "lognormal"])
def test_lookahead_wastes_little_on_padding(spread):
    rng = np.random.default_rng(0)
    if spread == "uniform":
        lengths = rng.integers(1, 4096, size=4000)
    else:
        lengths = np.clip(rng.lognormal(6.5, 1.2, size=4000), 1, 20_000).astype(int)
    assert wasted(lengths, 4096, 64, 256) < 0.03
    assert wasted(lengths, 4096, 64, 1) > 0.1


@ANY
@given(
    lengths=LENGTHS,
    chunks=st.integers(1, 8),
    chunk_size=st.one_of(st.none(), st.integers(1, 5)),
    lookahead=st.integers(1, 6),
    data=st.data(),
)
def test_a_packer_goes_on_from_its_position_anywhere(lengths, chunks, chunk_size, lookahead, data):
    documents = documents_of(lengths)
    length = chunks * (chunk_size or 3)

    def new() -> Packer:
        return pack(documents, length, chunk_size, lookahead=lookahead)

    plans = plans_of(new())
    stop = data.draw(st.integers(0, len(plans)))
    packer = new()
    for _ in range(stop):
        packer.plan()
    resumed = new()
    resumed._next_document = packer._next_document
    resumed.resume(copy.deepcopy(packer.waiting))
    assert plans_of(resumed) == plans[stop:]

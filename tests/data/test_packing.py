"""Packing alone, over arrays."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_dist.data.packing import JoinedPacker, PackedSequence, Packer, SeparatePacker

END = 1_000_000
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    ids = itertools.count()
    return [np.array([next(ids) for _ in range(length)], dtype=np.int32) for length in lengths]


def pack(documents: Iterable[np.ndarray], sequence_length: int, chunk_size: int | None = None) -> Packer:
    """Separate documents with a chunk size, joined ones without."""
    arguments = {"sequence_length": sequence_length, "end_of_document": END}
    if chunk_size is None:
        return JoinedPacker(iter(documents).__next__, **arguments)
    return SeparatePacker(iter(documents).__next__, **arguments, chunk_size=chunk_size)


def sequences_of(packer: Packer) -> list[PackedSequence]:
    """Until the documents end."""
    sequences = []
    while True:
        try:
            sequences.append(packer.next_sequence())
        except StopIteration:
            return sequences


@given(lengths=LENGTHS, sequence_length=st.integers(1, 50))
def test_joined_sequences_are_the_documents_in_order_and_each_token_is_predicted_once(lengths, sequence_length):
    documents = documents_of(lengths)
    expected = np.concatenate([np.append(document, END) for document in documents])
    count = (len(expected) - 1) // sequence_length
    sequences = sequences_of(pack(documents, sequence_length))

    assert len(sequences) == count
    inputs = np.concatenate([sequence.tokens for sequence in sequences] or [expected[:0]])
    labels = np.concatenate([sequence.labels for sequence in sequences] or [expected[:0]])
    np.testing.assert_array_equal(inputs, expected[: count * sequence_length])
    np.testing.assert_array_equal(labels, expected[1 : count * sequence_length + 1])
    assert all(sequence.loss_mask.all() and sequence.cu_seqlens is None for sequence in sequences)


@given(lengths=LENGTHS, chunks=st.integers(1, 8), chunk_size=st.integers(1, 9))
def test_separate_documents_are_padded_to_whole_chunks_and_each_token_is_an_input_once(lengths, chunks, chunk_size):
    documents = documents_of(lengths)
    # One more, longer than a sequence: the documents of interest are all packed when it is reached.
    sequences = sequences_of(pack([*documents, np.full(chunks * chunk_size, -1)], chunks * chunk_size, chunk_size))
    inputs, labels = [], []
    for sequence in sequences:
        assert sequence.tokens.dtype == sequence.labels.dtype == np.int64
        assert (sequence.loss_mask.dtype, sequence.cu_seqlens.dtype) == (bool, np.int32)
        assert (sequence.cu_seqlens[0], sequence.cu_seqlens[-1]) == (0, chunks * chunk_size)
        assert not (sequence.cu_seqlens % chunk_size).any()
        assert (np.diff(sequence.cu_seqlens) > 0).all()
        for start, end in itertools.pairwise(sequence.cu_seqlens):
            real = int(sequence.loss_mask[start:end].sum())
            assert sequence.loss_mask[start : start + real].all()
            assert end - start - real < chunk_size
            # What is cut off at the end of a sequence fills it: only a document's end is padded.
            assert end - start == real or sequence.labels[start + real - 1] == END
            assert (sequence.tokens[start + real : end] == END).all()
            inputs.append(sequence.tokens[start : start + real])
            labels.append(sequence.labels[start : start + real])
    total = sum(lengths)
    expected = np.concatenate([np.append(document[1:], END) for document in documents])
    np.testing.assert_array_equal(np.concatenate(inputs)[:total], np.concatenate(documents))
    np.testing.assert_array_equal(np.concatenate(labels)[:total], expected)


def test_a_document_longer_than_the_rest_goes_on_in_the_next_sequence():
    first, second = sequences_of(pack(documents_of([3, 9, 4]), 8, 4))
    assert first.tokens.tolist() == [0, 1, 2, END, 3, 4, 5, 6]
    assert first.labels.tolist() == [1, 2, END, END, 4, 5, 6, 7]
    assert first.loss_mask.tolist() == [True] * 3 + [False] + [True] * 4
    assert first.cu_seqlens.tolist() == [0, 4, 8]
    assert second.tokens.tolist() == [7, 8, 9, 10, 11, END, END, END]


@given(
    lengths=LENGTHS,
    chunks=st.integers(1, 8),
    chunk_size=st.one_of(st.none(), st.integers(1, 5)),
    data=st.data(),
)
def test_a_packer_goes_on_from_its_position_anywhere(lengths, chunks, chunk_size, data):
    documents = documents_of(lengths)
    sequence_length = chunks * (chunk_size or 3)
    sequences = sequences_of(pack(documents, sequence_length, chunk_size))
    stop = data.draw(st.integers(0, len(sequences)))
    used = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal used
        for document in documents:
            used += 1
            yield document

    packer = pack(counted(), sequence_length, chunk_size)
    for _ in range(stop):
        packer.next_sequence()
    resumed = pack(documents[used - packer.inside_document :], sequence_length, chunk_size)
    resumed.resume(packer.position())
    rest = sequences_of(resumed)
    assert len(rest) == len(sequences) - stop
    for actual, expected in zip(rest, sequences[stop:], strict=True):
        for name in ("tokens", "labels", "loss_mask", "cu_seqlens"):
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize(("chunk_size", "offset"), [(None, 6), (4, 5)])
def test_resuming_in_a_document_that_became_shorter_is_refused(chunk_size, offset):
    packer = pack(documents_of([5]), 4, chunk_size)
    packer.resume({"offset": offset, "last_token": 0})
    with pytest.raises(ValueError, match=f"token {offset} of a document that now has 5 tokens"):
        packer.next_sequence()

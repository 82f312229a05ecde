"""Packing alone, over arrays."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_dist.data.packing import DocumentPacker

END = 1_000_000


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    ids = itertools.count()
    return [np.array([next(ids) for _ in range(length)], dtype=np.int32) for length in lengths]


def pack(documents: list[np.ndarray], sequence_length: int) -> DocumentPacker:
    return DocumentPacker(iter(documents).__next__, sequence_length=sequence_length, end_of_document=END)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    sequence_length=st.integers(1, 50),
)
def test_windows_are_the_documents_in_order_and_each_token_is_predicted_once(lengths, sequence_length):
    documents = documents_of(lengths)
    expected = np.concatenate([np.append(document, END) for document in documents])
    packer = pack(documents, sequence_length)
    count = (len(expected) - 1) // sequence_length
    windows = [packer.next_window() for _ in range(count)]

    inputs = np.concatenate([window[:-1] for window in windows] or [expected[:0]])
    labels = np.concatenate([window[1:] for window in windows] or [expected[:0]])
    np.testing.assert_array_equal(inputs, expected[: count * sequence_length])
    np.testing.assert_array_equal(labels, expected[1 : count * sequence_length + 1])
    with pytest.raises(StopIteration):
        packer.next_window()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    sequence_length=st.integers(1, 20),
    data=st.data(),
)
def test_resume_needs_only_the_offset_and_the_last_token(lengths, sequence_length, data):
    documents = documents_of(lengths)
    count = (sum(lengths) + len(lengths) - 1) // sequence_length
    stop = data.draw(st.integers(0, count))
    used = 0

    def next_document() -> np.ndarray:
        nonlocal used
        used += 1
        return documents[used - 1]

    packer = DocumentPacker(next_document, sequence_length=sequence_length, end_of_document=END)
    for _ in range(stop):
        packer.next_window()
    resumed = pack(documents[used - packer.inside_document :], sequence_length)
    resumed.resume(offset=packer.offset, last_token=packer.last_token)
    for _ in range(count - stop):
        np.testing.assert_array_equal(resumed.next_window(), packer.next_window())


def test_resuming_in_a_document_that_became_shorter_is_refused():
    packer = pack(documents_of([5]), 4)
    packer.resume(offset=6, last_token=0)
    with pytest.raises(ValueError, match="token 6 of a document that now has 5 tokens"):
        packer.next_window()

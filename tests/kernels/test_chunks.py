"""Chunk grids: where every chunk is, against a loop over documents."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dash_kernels.chunks import ChunkGrid
from tests.kernels.attention_inputs import DEVICE


def rows(grid: ChunkGrid) -> list[list[int]]:
    """[id, start, length, first] of every slot."""
    return torch.stack((grid.ids, grid.starts, grid.lengths, grid.firsts), dim=1).tolist()


def rows_by_loop(cu_seqlens: list[int], chunk_size: int) -> list[list[int]]:
    expected: list[list[int]] = []
    for start, end in itertools.pairwise(cu_seqlens):
        first = len(expected)
        for token in range(start, end, chunk_size):
            expected.append([len(expected), token, min(chunk_size, end - token), first])
    return expected


def test_packed_documents_by_hand() -> None:
    """Documents of 20, 0, 16 and 1 tokens."""
    grid = ChunkGrid.packed([0, 20, 20, 36, 37], 16)
    assert rows(grid) == [[0, 0, 16, 0], [1, 16, 4, 0], [2, 20, 16, 2], [3, 36, 1, 3]]
    assert len(grid) == 4
    assert grid.tokens == 37
    assert all(x.dtype == torch.int32 for x in (grid.ids, grid.starts, grid.lengths, grid.firsts))


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=12), chunk_size=st.sampled_from((16, 48)))
def test_packed_documents_by_a_loop(sizes: list[int], chunk_size: int) -> None:
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).tolist()
    grid = ChunkGrid.packed(cu_seqlens, chunk_size)
    assert rows(grid) == rows_by_loop(cu_seqlens, chunk_size)
    assert grid.tokens == sum(sizes)


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 160])
def test_a_whole_sequence_is_one_document_and_shared_by_its_calls(seq_len: int) -> None:
    grid = ChunkGrid.whole_sequence(seq_len, 16)
    assert rows(grid) == rows_by_loop([0, seq_len], 16)
    assert grid is ChunkGrid.whole_sequence(seq_len, 16)
    assert grid is not ChunkGrid.whole_sequence(seq_len, 32)


def test_complete_chunks_of_a_shard() -> None:
    assert rows(ChunkGrid.complete([1, 6], 16)) == [[1, 0, 16, 0], [6, 16, 16, 0]]


def test_slots_by_id_and_uploads_are_kept() -> None:
    device = torch.device(DEVICE)
    grid = ChunkGrid.complete([5, 0, 3], 16)
    slots = grid.slots_by_id(7, device)
    assert slots.tolist() == [1, -1, -1, 2, -1, 0, -1]
    assert slots.dtype == torch.int32
    assert slots is grid.slots_by_id(7, device)
    assert grid.slots_by_id(6, device).tolist() == [1, -1, -1, 2, -1, 0]
    uploaded = grid.on(device)
    assert uploaded.is_contiguous()
    assert uploaded.dtype == torch.int32
    assert uploaded.tolist() == [[5, 0, 3], [0, 16, 32], [16] * 3, [0] * 3]
    assert uploaded is grid.on(device)


class Operations(TorchDispatchMode):
    """Counts the tensor operations within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_tensor_operation_is_repeated_for_each_chunk_or_document() -> None:
    """Grids of a million tokens in ten thousand documents, which are made before every step."""
    bounds = sorted([0, 2**20, *torch.randint(0, 2**20, (9999,)).tolist()])
    for build in (lambda: ChunkGrid.packed(bounds, 64), lambda: ChunkGrid.complete(range(16384), 64)):
        with Operations() as operations:
            build()
        assert 0 < operations.count < 100

"""Window attention over ranks against the float64 reference, and the halo that comes before each stretch."""

import pytest
import torch

from dash_dist.context_parallel import WindowAttention
from dash_dist.context_parallel.halo import plan_halo, stretches
from dash_dist.context_parallel.layout import shard_chunks
from dash_kernels import ChunkGrid
from dash_kernels.reference import reference_window_attention
from tests.context_parallel.attention_cases import CHUNK, HEAD_DIM
from tests.context_parallel.window_jobs import WINDOWS
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("borders", [None, (0, 1, 64, 64, 70, 187)])
def test_one_device_at_an_odd_length(borders: tuple[int, ...] | None) -> None:
    shapes = ((2 if borders is None else 1, 187, heads, HEAD_DIM) for heads in (4, 2, 2))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    layer = WindowAttention(2, HEAD_DIM, 21, chunk_size=CHUNK, dtype=torch.float64)
    out = layer(q, k, v, chunks=None if borders is None else ChunkGrid.packed(borders, CHUNK))
    cu_seqlens = None if borders is None else torch.tensor(borders)
    wanted = reference_window_attention(q, k, v, window=21, cu_seqlens=cu_seqlens)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(out, (q, k, v, layer.summary_query), grad, retain_graph=True),
        (*torch.autograd.grad(wanted, (q, k, v), grad), torch.zeros(2, HEAD_DIM, dtype=torch.float64)),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_layout_equals_the_reference(size: int) -> None:
    for differences in run_ranks("tests.context_parallel.window_jobs:parity", size):
        assert len(differences) == 3 * 3 * len(WINDOWS)
        for case, difference in differences.items():
            assert difference < 1e-11, case


@pytest.mark.slow
def test_recomputation_gives_the_same_bits() -> None:
    for found in run_ranks("tests.context_parallel.window_jobs:recomputed", 4):
        assert all(found.values()), found


def test_only_the_halo_travels() -> None:
    """Once each way. A window of two chunks reaches 2 chunks back, and one piece has no other before it."""
    found = run_ranks("tests.context_parallel.window_jobs:sent_chunks", 4, 2 * CHUNK, cpu_only=True)[0]
    # Borders between pieces of different ranks, and those of them between ranks of different nodes; K, V and gradients.
    assert found["contiguous"] == (3 * 2 * 2, 1 * 2 * 2, 2)
    assert found["zigzag"] == (6 * 2 * 2, 2 * 2 * 2, 2)
    assert found["double_zigzag"] == (12 * 2 * 2, 4 * 2 * 2, 2)


def test_a_mistake_at_one_rank_is_an_error_at_all() -> None:
    for found in run_ranks("tests.context_parallel.window_jobs:mistakes", 2, cpu_only=True):
        assert "window is, at rank 0: 5; rank 1: 6" in found["window"]
        assert "chunks is, at rank 0" in found["documents"]
        assert "sequence length 392 is not a multiple of" in found["length"]


def test_stretches_end_with_documents_and_pieces() -> None:
    documents = ChunkGrid.packed([0, 3 * CHUNK, 3 * CHUNK, 16 * CHUNK], CHUNK)
    cut = stretches(shard_chunks(documents, 0, 2, "zigzag"), 2)  # chunks 0-3 and 12-15
    assert [(len(one.slots), one.first_chunk, one.halo) for one in cut] == [(3, 0, 0), (1, 3, 0), (4, 12, 2)]
    adjacent = stretches(shard_chunks(documents, 1, 2, "zigzag"), 5)  # chunks 4-11, two pieces that touch
    assert [(len(one.slots), one.first_chunk, one.halo) for one in adjacent] == [(8, 4, 1)]


def test_a_chunk_that_two_stretches_need_comes_once() -> None:
    sequence = ChunkGrid.whole_sequence(16 * CHUNK, CHUNK)
    plan = plan_halo(sequence, 0, 2, "double_zigzag", chunk_size=CHUNK, window=16 * CHUNK)
    # Rank 0 holds the chunks 0-1, 6-9 and 14-15, in three stretches, and needs all others.
    assert plan.receive == (0, 8)
    assert plan.send == (0, 6)  # rank 1 ends with chunk 13
    assert len(plan.band) == 2 + 10 + 16
    assert plan.segments.key_edges == [0, 2 * CHUNK, 12 * CHUNK, 28 * CHUNK]

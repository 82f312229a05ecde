"""The distributed call against the one-process result, on 2 and 4 ranks (NCCL where there are as many GPUs)."""

import itertools

import pytest
import torch

from dash_dist import dash_attention, join_sequence, shard_positions, split_sequence
from dash_dist.context_parallel.layout import (
    LAYOUTS,
    gathered_chunks,
    imbalance_by_layout,
    shard_chunks,
)
from dash_kernels.chunks import ChunkGrid
from tests.support.ranks import backend_for, run_ranks

SIZES = [2, pytest.param(4, marks=pytest.mark.skipif(0 < torch.cuda.device_count() < 4, reason="needs 4 GPUs"))]


@pytest.mark.parametrize("size", SIZES)
def test_every_exchange_equals_one_process(size: int) -> None:
    """In both layouts, for one document, packed ones, and a rank of nothing but padding."""
    for differences in run_ranks("tests.context_parallel.attention_jobs:parity", size):
        for case, by_name in differences.items():
            density = by_name.pop("density")
            assert density < 0.8 or "padding" in case, (case, "too dense to test a selection")
            assert max(by_name.values()) < 1e-10, (case, by_name)


@pytest.mark.parametrize("size", SIZES)
def test_shards_of_one_chunk(size: int) -> None:
    for differences in run_ranks("tests.context_parallel.attention_jobs:parity_of_the_smallest_shards", size):
        for case, by_name in differences.items():
            assert max(by_name.values()) < 1e-10, (case, by_name)


def test_routing_selects_the_same_bits_at_every_size() -> None:
    for found in run_ranks("tests.context_parallel.routing_jobs:selection_of_group_sizes", 4, cpu_only=True):
        for case, same in found.items():
            assert 0 < same.pop("selected") < 0.3, case
            assert all(same.values()), (case, same)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_neither_another_run_nor_what_is_not_sent_changes_a_bit(size: int) -> None:
    for found in run_ranks("tests.context_parallel.attention_jobs:same_bits", size):
        for case, same in found.items():
            assert all(same.values()), (case, same)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_first_token_reaches_the_last_rank(size: int) -> None:
    changes = run_ranks("tests.context_parallel.attention_jobs:first_token_reaches_the_last_rank", size)[size - 1]
    assert len(changes) == (8 if size == 2 else 10)
    assert min(changes.values()) > 1e-6, changes


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_chunk_that_nobody_selected_changes_nothing_elsewhere(size: int) -> None:
    for found in run_ranks("tests.context_parallel.attention_jobs:a_chunk_that_nobody_selected", size):
        assert all(found.values()), found


def test_sent_bytes_are_the_plans() -> None:
    """The job checks every rank; this test the sum over all, with ranks 0-1 and 2-3 as nodes."""
    found = run_ranks("tests.context_parallel.attention_jobs:bytes_sent", 4, cpu_only=True)[0]
    for case in ("zigzag, selective", "contiguous, selective"):
        for packed in (False, True):
            flat, two_level = found[f"{case}, {packed}"], found[f"{case}, 2, {packed}"]
            assert 0 < flat["sent"] < flat["dense"] == two_level["dense"]
            assert two_level["sent"] < two_level["dense"]
            assert two_level["slow"] <= flat["slow"]
        shared = found[f"{case}, shared"], found[f"{case}, 2, shared"]
        assert shared[1]["slow"] == shared[0]["slow"] / 2


def test_auto_takes_the_same_exchange_everywhere_by_the_cost_model() -> None:
    first, *others = run_ranks("tests.context_parallel.attention_jobs:automatic_choices", 4, cpu_only=True)
    assert all(other == first for other in others)
    assert first["bandwidth is scarce"] == first["nothing is needed"] == ["selective"]
    assert first["messages are slow"] == ["allgather"]
    assert first["memory is scarce"] == ["ring"]


@pytest.mark.parametrize("size", SIZES)
def test_split_join_and_their_gradients(size: int) -> None:
    for result in run_ranks("tests.context_parallel.attention_jobs:split_and_join", size):
        assert all(result.values()), result


def test_module_owns_the_summary_query() -> None:
    for difference, size in run_ranks("tests.context_parallel.attention_jobs:module_trains", 2):
        assert difference < 1e-10 < size


@pytest.mark.gpu
@pytest.mark.skipif(backend_for(2) == "gloo", reason="needs 2 GPUs")
def test_bfloat16_kernels_under_nccl() -> None:
    for differences in run_ranks("tests.context_parallel.attention_jobs:triton_parity", 2):
        print(differences)
        assert differences["selected"] == 0
        assert differences.pop("density") < 0.95
        assert max(differences.values()) < 2**-6  # a few roundings of bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is no interpreter")
def test_interpreted_kernels_under_gloo() -> None:
    for found in run_ranks("tests.context_parallel.routing_jobs:interpreted_kernels", 2):
        for layout, differences in found.items():
            assert differences.pop("density") < 0.95, "too dense to test a selection"
            assert differences.pop("bits") == 0, layout
            # The terms of this sum over tokens cancel: PyTorch's float32 alone is off by 1.3e-4 in one of 500 draws.
            assert differences.pop("summary_query") < 1e-3, layout
            assert max(differences.values()) < 1e-4, (layout, differences)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_partition_the_sequence_in_whole_chunks(layout: str) -> None:
    for size in (1, 2, 3, 8):
        sequence = ChunkGrid.packed([0, 32, 32 + 64 * size, 128 * size], 16)
        chunks = [shard_chunks(sequence, rank, size, layout) for rank in range(size)]
        in_rank_order = list(itertools.chain.from_iterable(shard.ids.tolist() for shard in chunks))
        assert sorted(in_rank_order) == list(range(8 * size))
        assert gathered_chunks(sequence, size, layout).ids.tolist() == in_rank_order
        positions = [shard_positions(8 * size * 16, rank, size, layout) for rank in range(size)]
        for shard, own in zip(chunks, positions, strict=True):
            assert (own.view(8, 16)[:, 0] == shard.ids * 16).all()
            assert torch.equal(shard.firsts, sequence.firsts[shard.ids.long()])


def test_zigzag_pairs_the_first_piece_with_the_last() -> None:
    sequence = ChunkGrid.whole_sequence(8 * 16, 16)
    assert shard_chunks(sequence, 0, 2, "zigzag").ids.tolist() == [0, 1, 6, 7]
    assert shard_chunks(sequence, 1, 2, "zigzag").ids.tolist() == [2, 3, 4, 5]
    assert shard_chunks(sequence, 0, 2, "double_zigzag").ids.tolist() == [0, 3, 4, 7]
    assert shard_chunks(sequence, 1, 2, "double_zigzag").ids.tolist() == [1, 2, 5, 6]


def test_the_double_zigzag_balances_work_that_levels_off() -> None:
    work = torch.arange(1, 1025).sqrt() * 1000
    uneven = imbalance_by_layout(work, 8)
    assert 1 < uneven["double_zigzag"] < uneven["zigzag"] < uneven["contiguous"]
    assert (uneven["zigzag"] - 1) / (uneven["double_zigzag"] - 1) > 2
    assert set(imbalance_by_layout(work[:16], 8)) == {"zigzag", "contiguous"}  # not enough chunks


def test_imbalance_is_the_busiest_rank_over_the_mean_one() -> None:
    causal = torch.arange(1, 9)
    assert imbalance_by_layout(causal, 2) == {"zigzag": 1.0, "double_zigzag": 1.0, "contiguous": (5 + 6 + 7 + 8) / 18}
    assert imbalance_by_layout(causal, 8) == {"contiguous": 8 / 4.5}  # 8 chunks are not 16 pieces
    assert imbalance_by_layout(torch.zeros(4), 2) == {"zigzag": 1.0, "contiguous": 1.0}


def test_without_a_group_the_call_is_the_one_device_call() -> None:
    x = torch.randn(1, 40, 2, 16)
    assert split_sequence(x, None) is x
    assert join_sequence(x, None) is x
    c = torch.zeros(2, 16)
    out, routing = dash_attention(x, x, x, c, chunk_size=16, return_routing=True)
    assert out.shape == x.shape
    assert routing.selected_per_token.shape == (1, 40, 2)
    with pytest.raises(ValueError, match="layout is 'spiral'"):
        dash_attention(x, x, x, c, chunk_size=16, layout="spiral")


def test_lengths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence length 100 is not a multiple of 8.*pad to 104"):
        shard_positions(100, 0, 4, "zigzag")
    with pytest.raises(ValueError, match=r"6 chunks cannot be cut into 4 pieces.*pad it to 8 chunks"):
        shard_chunks(ChunkGrid.whole_sequence(6 * 16, 16), 0, 2, "zigzag")

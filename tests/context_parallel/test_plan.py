"""The selective exchange: what its plan moves, over which links, and what becomes of it when a rank dies."""

import logging
import weakref

import pytest
import torch

from dash_dist.context_parallel import blocks
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.layout import shard_chunks
from dash_dist.context_parallel.plan import reachable_chunks
from dash_dist.context_parallel.topology import _ranks_per_node
from dash_dist.context_parallel.transfer import Timing
from dash_dist.cost_model.topology import Topology
from dash_kernels.chunks import ChunkGrid
from tests.support.ranks import backend_for, run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 6])
def test_what_the_plan_says_travels_and_nothing_else(size: int) -> None:
    """Blocks, addresses, bytes by link, the busiest rank, NaN in all that stays at home, sums of gradients."""
    for wrong in run_ranks("tests.context_parallel.plan_jobs:exchanges", size, cpu_only=True):
        assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(backend_for(2) == "gloo", reason="needs 2 GPUs")
def test_the_same_under_nccl() -> None:
    for wrong in run_ranks("tests.context_parallel.plan_jobs:exchanges", 2):
        assert not wrong, "\n".join(wrong)
    for same in run_ranks("tests.context_parallel.plan_jobs:same_bits_in_every_run", 2):
        assert all(same)


def test_gradients_come_home_as_the_same_bits_in_every_run() -> None:
    for same in run_ranks("tests.context_parallel.plan_jobs:same_bits_in_every_run", 4, cpu_only=True):
        assert all(same)


@pytest.mark.parametrize("head_dim", [16, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_blocks_are_packed_from_strided_memory_and_added_back(dtype: torch.dtype, head_dim: int) -> None:
    """head_dim 5 is copied number by number, k and v are slices of one tensor."""
    fused = torch.randn(2, 4 * 8, 2 * 3, head_dim, dtype=torch.float64).to(dtype)
    k, v = fused.chunk(2, dim=2)
    places = torch.tensor([[1, 0, 1, 1], [3, 0, 3, 0], [2, 1, 0, 2]])  # index in the batch, slot, KV head
    packed = blocks.pack(k, v, places, chunk_size=8)
    gradient, expected = torch.zeros(2, 2, *k.shape, dtype=dtype)
    blocks.add(gradient, torch.cat((packed, packed[:1])), torch.cat((places, places[:, :1]), 1), [3, 0, 2])
    for i, (index, slot, head) in enumerate(places.T.tolist()):
        tokens = slice(8 * slot, 8 * slot + 8)
        for x, of_x, block in zip((k, v), expected, packed[i], strict=True):
            assert torch.equal(block, x[index, tokens, head])
            of_x[index, tokens, head] += block * (2 if i == 0 else 1)
    assert torch.equal(gradient, expected)


def test_a_group_of_one_rank() -> None:
    for result in run_ranks("tests.context_parallel.plan_jobs:one_rank_alone", 2, cpu_only=True):
        assert result == {"blocks": 0, "same": True, "idle": True, "coverage": 0.0}


def test_a_transfer_knows_how_long_it_was_waited_for() -> None:
    for before, after, transfer, waited in run_ranks(
        "tests.context_parallel.plan_jobs:timing_of_a_transfer", 2, cpu_only=True
    ):
        assert (before, after) == (False, True)
        assert 0 <= waited <= transfer
        assert transfer >= 0.2


def test_counters_that_nobody_asks_for_do_not_pile_up() -> None:
    traffic, timings = Traffic(), []
    for _ in range(4):
        timing = Timing(torch.device("cpu"))
        traffic.started(timing)
        for moment in (timing.issued, timing.called, timing.arrived, timing.resumed):
            moment.record()
        timing.is_over = True
        timings.append(weakref.ref(timing))
    del timing, moment
    assert [timing() is None for timing in timings] == [True, True, True, False]
    last = timings[-1]()
    assert last is not None
    assert traffic.take().transfer_seconds >= last.seconds()[0] > 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "what"),
    [
        ("plan", "the plan of the exchange"),
        ("fetch", "K and V of the selected chunks"),
        ("gradients", "gradients of the selected chunks' K and V"),
    ],
)
def test_the_others_say_which_exchange_a_dead_rank_was_part_of(moment: str, what: str) -> None:
    *survivors, dead = run_ranks(
        "tests.context_parallel.plan_jobs:survivors", 4, moment, True, 60.0, cpu_only=True, dying={3}
    )
    assert dead is None
    for rank, (message, seconds) in enumerate(survivors):
        assert message.startswith(f"rank {rank}: {what} did not get through")
        assert "group of ranks [0, 1, 2, 3]" in message
        assert seconds < 60  # before the group's time is over


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_an_error_after_the_groups_timeout() -> None:
    *waiting, _ = run_ranks("tests.context_parallel.plan_jobs:survivors", 4, "fetch", False, 4.0, cpu_only=True)
    for rank, (message, seconds) in enumerate(waiting):
        assert message.startswith(f"rank {rank}: K and V of the selected chunks did not get through")
        assert seconds < 60  # that of the process group around it is 120


def test_nodes_are_found_by_host_name() -> None:
    assert (
        run_ranks("tests.context_parallel.plan_jobs:topology_by_host_name", 2, cpu_only=True) == [[2, False, True]] * 2
    )


@pytest.mark.parametrize(
    ("hosts", "ranks_per_node"), [("aabb", 2), ("aaaa", 4), ("abcd", 1), ("aabbb", 5), ("abab", 4), ("aabbaa", 6)]
)
def test_only_equal_nodes_of_consecutive_ranks_are_nodes(
    hosts: str, ranks_per_node: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert _ranks_per_node(list(hosts), speaks=True) == ranks_per_node
    assert bool(caplog.records) == (len(hosts) == ranks_per_node and hosts != "aaaa")


def test_topologies() -> None:
    assert [Topology(8, count).is_two_level for count in (1, 2, 4, 8)] == [False, True, True, False]
    assert Topology(8, 2).place(5) == (2, 1)
    assert list(Topology(8, 2).node_ranks(5)) == [4, 5]
    assert list(Topology(8, 2).column_ranks(5)) == [1, 3, 5, 7]
    with pytest.raises(ValueError, match=r"ranks_per_node is 3, which does not divide .* 8: give one of 1, 2, 4, 8"):
        Topology(8, 3)


def test_reachable_chunks() -> None:
    sequence = ChunkGrid.whole_sequence(8 * 16, 16)
    assert reachable_chunks(shard_chunks(sequence, 0, 2, "zigzag"), 8) == 4  # 0 1 6 7 reach 2 3 4 5
    assert reachable_chunks(shard_chunks(sequence, 1, 2, "zigzag"), 8) == 2  # 2 3 4 5 reach 0 1
    assert reachable_chunks(shard_chunks(sequence, 0, 2, "contiguous"), 8) == 0
    # Chunks 2 3 6 7 of documents 0-2, 3-4, 5-7: 2 reaches 0 1, 3 starts a document, 6 and 7 reach 5.
    packed = ChunkGrid(torch.tensor([2, 3, 6, 7]), torch.full((4,), 16), torch.tensor([0, 3, 5, 5]))
    assert reachable_chunks(packed, 8) == 3

"""What a step counts of its exchanges, what it leaves behind, and how it ends when a rank does."""

from typing import Any

import pytest

from dash_dist.context_parallel.exchange import EXCHANGES
from tests.support.models import CHUNK_SIZE, MODEL, SEQUENCE_LENGTH, SEQUENCES, Case
from tests.support.ranks import run_ranks

DENSE_ROUTING = 1e-3  # the routing scale at which every token selects every chunk
SHARP_ROUTING = 100.0
ON_TWO = {
    "ring": Case(context=2, exchange="ring"),
    "allgather": Case(context=2, exchange="allgather"),
    "selective": Case(context=2, exchange="selective", routing_scale=SHARP_ROUTING),
    "selective, contiguous": Case(
        context=2, exchange="selective", layout="contiguous", routing_scale=SHARP_ROUTING, micro_batch_size=4
    ),
    "selective, recompute": Case(context=2, exchange="selective", recompute="full", routing_scale=SHARP_ROUTING),
    "allgather, recompute": Case(context=2, exchange="allgather", recompute="full"),
    "dense routing": Case(context=2, exchange="selective", routing_scale=DENSE_ROUTING),
    "dense routing, contiguous": Case(
        context=2, exchange="selective", layout="contiguous", routing_scale=DENSE_ROUTING
    ),
    "two nodes": Case(context=2, exchange="selective", ranks_per_node=1, routing_scale=SHARP_ROUTING),
    "no context parallelism": Case(tensor=2),
}
WINDOWS = {
    "windows": Case(context=2, kind="window", window=CHUNK_SIZE + 1),
    "windows, recompute": Case(context=2, kind="window", window=CHUNK_SIZE + 1, recompute="full"),
    "windows, then dash": Case(
        context=2,
        kind=("window", "dash"),
        window=CHUNK_SIZE + 1,
        exchange="selective",
        routing_scale=DENSE_ROUTING,
    ),
}
ON_FOUR = {
    "ring, tp 2": Case(tensor=2, context=2, exchange="ring"),
    "ring, pp 2": Case(pipeline=2, context=2, exchange="ring"),
    "selective, tp 2": Case(tensor=2, context=2, exchange="selective", routing_scale=SHARP_ROUTING),
    "selective, pp 2": Case(pipeline=2, context=2, exchange="selective", routing_scale=SHARP_ROUTING),
    "selective, dp 2": Case(context=2, exchange="selective", routing_scale=SHARP_ROUTING),
    "two ranks a node": Case(context=4, exchange="selective", ranks_per_node=2, routing_scale=DENSE_ROUTING),
}

# K and V of a KV head's chunk, or their gradients, in float32; and how many there are of one chunk id in a step.
BLOCK = 2 * CHUNK_SIZE * MODEL.resolved_head_dim * 4
BLOCKS = SEQUENCES * MODEL.num_layers * MODEL.num_kv_heads
CHUNKS = SEQUENCE_LENGTH // CHUNK_SIZE
PASSES = 3  # K and V forward and backward, gradients once


@pytest.fixture(scope="module")
def statistics() -> dict[str, Any]:
    """Case -> its statistics, which are the same at every rank."""
    by_case: dict[str, Any] = {}
    for world_size, cases in ((2, ON_TWO | WINDOWS), (4, ON_FOUR)):
        first, *others = run_ranks("tests.megatron.exchange_jobs:statistics_of_steps", world_size, cases, cpu_only=True)
        assert all(other == first for other in others)
        by_case |= first
    return by_case


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ring", "ring, tp 2", "ring, pp 2"])
def test_the_ring_sends_every_shard_round(statistics: dict[str, Any], name: str) -> None:
    # Two ranks: K and V take a step forward, two backward; gradients take two, the second of them home.
    sent, dense = (steps * BLOCK * BLOCKS * CHUNKS for steps in (5, PASSES))
    got = statistics[name]
    assert (got.planned_bytes, got.sent_bytes, got.dense_bytes, got.slow_link_bytes) == (sent, sent, dense, 0)
    assert got.coverage == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["allgather", "allgather, recompute"])
def test_the_allgather_sends_every_shard_to_the_other_rank(statistics: dict[str, Any], name: str) -> None:
    sent = PASSES * BLOCK * BLOCKS * CHUNKS
    got = statistics[name]
    assert (got.planned_bytes, got.sent_bytes, got.dense_bytes, got.slow_link_bytes) == (sent, sent, sent, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needed"),
    [("dense routing", 4 + 2), ("dense routing, contiguous", 4)],  # zigzag: rank 0 has 0, 1, 6, 7, rank 1 the others
)
def test_dense_routing_needs_every_earlier_chunk(statistics: dict[str, Any], name: str, needed: int) -> None:
    got = statistics[name]
    sent = PASSES * BLOCK * BLOCKS * needed
    assert (got.planned_bytes, got.sent_bytes, got.slow_link_bytes) == (sent, sent, 0)
    assert got.dense_bytes == PASSES * BLOCK * BLOCKS * CHUNKS
    assert got.coverage == {0: 1.0, 1: 1.0}
    # The token's chunk counts: chunk i has 1 + i of them to select, 36 over all.
    assert got.imbalance == {"zigzag": 1.0, "double_zigzag": 1.0, "contiguous": (5 + 6 + 7 + 8) / 18}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["selective", "selective, recompute", "selective, tp 2", "selective, pp 2", "selective, dp 2", "two nodes"]
)
def test_sharp_routing_sends_what_it_covers(statistics: dict[str, Any], name: str) -> None:
    """The same step at every layout, and no byte more where layers are recomputed."""
    got, expected = statistics[name], statistics["selective"]
    assert got.planned_bytes == got.sent_bytes < PASSES * BLOCK * BLOCKS * 6 < got.dense_bytes
    assert got.dense_bytes == PASSES * BLOCK * BLOCKS * CHUNKS
    assert list(got.coverage) == [0, 1]
    needed = sum(coverage * 6 * BLOCKS / MODEL.num_layers for coverage in got.coverage.values())
    assert got.sent_bytes == round(PASSES * BLOCK * needed)
    assert got.slow_link_bytes == (got.sent_bytes if name == "two nodes" else 0)
    assert (got.sent_bytes, got.coverage, got.imbalance) == (
        expected.sent_bytes,
        expected.coverage,
        expected.imbalance,
    )


@pytest.mark.slow
def test_two_levels_cross_the_slow_links_once(statistics: dict[str, Any]) -> None:
    # Zigzag on four: one node has the chunks 0, 7 and 1, 6 and needs 2 to 5, of which each of its ranks needs all; the
    # other has 2, 5 and 3, 4 and needs 0 and 1. Who takes a chunk from the other node needs it too.
    got = statistics["two ranks a node"]
    assert got.slow_link_bytes == PASSES * BLOCK * BLOCKS * (4 + 2)
    needed = (6 + 5) + (4 + 3)  # earlier chunks than a rank's last, but for its own
    assert got.sent_bytes == got.planned_bytes == PASSES * BLOCK * BLOCKS * needed
    assert got.coverage == {0: 1.0, 1: 1.0}


@pytest.mark.slow
def test_the_other_layout_is_predicted(statistics: dict[str, Any]) -> None:
    zigzag, contiguous = statistics["selective"].imbalance, statistics["selective, contiguous"].imbalance
    assert list(zigzag) == ["zigzag", "double_zigzag", "contiguous"]
    assert zigzag == pytest.approx(contiguous, rel=1e-6)
    assert 1.0 <= zigzag["zigzag"] < zigzag["contiguous"] < (5 + 6 + 7 + 8) / 18


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ON_TWO, *ON_FOUR])
def test_overlap_and_the_exchange_are_known(statistics: dict[str, Any], name: str) -> None:
    got = statistics[name]
    if name == "no context parallelism":
        assert got is None
        return
    assert 0.0 <= got.overlap <= 1.0
    used = (ON_TWO | ON_FOUR)[name].exchange
    assert got.exchanges == {exchange: float(exchange == used) for exchange in EXCHANGES if exchange != "auto"}


@pytest.mark.slow
def test_a_halo_counts_as_traffic_and_not_as_an_exchange(statistics: dict[str, Any]) -> None:
    # Zigzag: rank 0 has the chunks 0, 1, 6 and 7 and needs chunk 5, rank 1 has the others and needs chunk 1.
    of_layers = BLOCK * BLOCKS * 2
    alone, again, mixed = (statistics[name] for name in WINDOWS)
    assert alone.planned_bytes == alone.sent_bytes == 2 * of_layers  # K and V, then gradients
    assert again.planned_bytes == again.sent_bytes == 3 * of_layers
    for got in (alone, again):
        assert got.coverage == {}
        assert set(got.exchanges.values()) == {0.0}
        assert set(got.imbalance.values()) == {1.0}
    dense = PASSES * BLOCK * BLOCKS * (4 + 2) // 2
    assert mixed.sent_bytes == of_layers + dense
    assert mixed.coverage == {1: 1.0}
    assert mixed.exchanges["selective"] == 1.0


def test_counters_are_given_away_once() -> None:
    for before, first, second in run_ranks("tests.megatron.exchange_jobs:asked_without_a_step", 2, cpu_only=True):
        assert "ask once after each step" in before
        assert first == "ExchangeStatistics"
        assert second == before


def test_a_failed_step_leaves_nothing_to_the_next_one() -> None:
    case = Case(context=2, exchange="selective", recompute="full", routing_scale=SHARP_ROUTING)
    for seen in run_ranks("tests.megatron.exchange_jobs:step_after_a_failed_one", 2, case, cpu_only=True):
        assert seen["remembered after a step"] == [0, 0]
        assert seen["remembered after a failed step"] == [1, 1]
        assert seen["after the failed one"].loss == seen["undisturbed"].loss
        assert seen["after the failed one"].grad_norm == seen["undisturbed"].grad_norm
        assert seen["traffic after the failed one"] == seen["undisturbed traffic"]


def test_a_dead_rank_ends_the_others_in_the_step_with_its_group() -> None:
    dying = 2
    seen = run_ranks("tests.megatron.exchange_jobs:a_rank_dies", 4, dying, cpu_only=True, dying=[dying])
    assert seen.pop(dying) is None
    for rank, (message, cause, seconds) in zip((0, 1, 3), seen, strict=True):
        assert message.startswith(f"step 2: rank {rank}: ")
        assert "the context-parallel group of ranks [0, 1, 2, 3]" in message
        assert message == f"step 2: {cause}"
        assert seconds < 60  # the group's timeout

"""The cost model behind exchange="auto"."""

import itertools
import math
from typing import Any

import pytest

from dash_dist.cost_model.exchange import Busiest, Cost, cheapest, predict
from dash_dist.cost_model.links import Links
from dash_dist.cost_model.topology import Topology

LINKS = Links()
BLOCKS = 8 * 1024  # of a rank: 8 KV heads, 64K tokens
CALL: dict[str, Any] = {
    "blocks_per_rank": BLOCKS,
    "block_size": 2 * 64 * 128,
    "element_size": 2,
    "gradient_element_size": 4,
    "group": 4,
    "planned": True,
}
PLENTY = 2**60


def busiest(share: float, topology: Topology) -> Busiest:
    """Every rank needs this share of all blocks of the others; all of them cross the links that an all-gather takes."""
    remote = round(share * BLOCKS * (topology.size - 1))
    slow = round(share * BLOCKS * (topology.size - topology.ranks_per_node) / topology.ranks_per_node)
    return Busiest(fast=remote - slow, slow=slow, held=remote)


def test_the_model_is_its_one_line() -> None:
    cost = Cost(messages=3, fast_bytes=5, slow_bytes=7, merged_bytes=11, held_bytes=13)
    links = Links(latency=100.0, fast_bandwidth=0.5, slow_bandwidth=0.25, memory_bandwidth=1.0)
    assert cost.seconds(links) == 300 + 10 + 28 + 11


def test_bytes_of_two_ranks_by_hand() -> None:
    costs = predict(Busiest(fast=10, slow=0, held=10), Topology(2, 2), **CALL)
    block = 2 * 64 * 128
    merge = 4 * BLOCKS * 64 * 128 * 2 * 2 * 4  # output and gradient of the queries, read and written, in float32
    assert costs["selective"] == Cost(3, 10 * block * 8, 0, merge, 10 * block * 6)
    assert costs["allgather"] == Cost(3, BLOCKS * block * 8, 0, merge, 2 * BLOCKS * block * 6)
    # K and V make a step forward and two backward, gradients two.
    assert costs["ring"] == Cost(5, BLOCKS * block * (3 * 2 + 2 * 4), 0, merge, 2 * BLOCKS * block * 6)


@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, 2), (8, 8), (64, 8), (512, 8), (8, 1)])
def test_the_more_is_needed_the_longer_selective_takes_until_another_is_cheaper(size: int, ranks_per_node: int) -> None:
    topology = Topology(size, ranks_per_node)
    shares = [step / 100 for step in range(101)]
    predictions = [predict(busiest(share, topology), topology, **CALL) for share in shares]
    seconds = [costs["selective"].seconds(LINKS) for costs in predictions]
    assert all(earlier < later for earlier, later in itertools.pairwise(seconds))
    choices = [cheapest(costs, LINKS, PLENTY) for costs in predictions]
    if topology.is_two_level:  # it pays for forwarding inside the nodes; an all-gather shares that between the links
        assert (choices[0], choices[-1]) == ("selective", "allgather")
        assert len([here for here, after in itertools.pairwise(choices) if here != after]) == 1
    else:
        assert set(choices) == {"selective"}  # never more bytes, in as many messages


def test_slower_links_and_bigger_groups_cost_more() -> None:
    topology = Topology(16, 8)
    costs = predict(busiest(0.2, topology), topology, **CALL)
    slower = {"latency": 40e-6, "fast_bandwidth": 75e9, "slow_bandwidth": 20e9, "memory_bandwidth": 1e11}
    for name, value in slower.items():
        assert costs["selective"].seconds(Links(**{name: value})) > costs["selective"].seconds(LINKS)
    for name in costs:
        bigger = predict(busiest(0.2, Topology(32, 8)), Topology(32, 8), **CALL)[name]
        assert bigger.seconds(LINKS) > costs[name].seconds(LINKS)


def test_what_does_not_fit_in_memory_is_not_chosen() -> None:
    topology = Topology(8, 8)
    costs = predict(busiest(0.99, topology), topology, **CALL)
    held = {name: cost.held_bytes for name, cost in costs.items()}
    assert held["ring"] < held["selective"] < held["allgather"]
    assert cheapest(costs, LINKS, held["selective"]) == "selective"
    assert cheapest(costs, LINKS, held["selective"] - 1) == "ring"
    assert cheapest(costs, LINKS, 0) == "ring"
    sparse = predict(busiest(0.05, topology), topology, **CALL)
    assert cheapest(sparse, LINKS, sparse["selective"].held_bytes) == "selective"


def test_a_plan_that_is_yet_to_be_made_costs_its_collectives() -> None:
    for topology, messages in ((Topology(8, 8), 3), (Topology(16, 8), 4)):
        made, to_make = (
            predict(busiest(0.1, topology), topology, **CALL | {"planned": planned}) for planned in (True, False)
        )
        assert to_make["selective"].messages - made["selective"].messages == messages
        assert {name: made[name] for name in ("allgather", "ring")} == {
            name: to_make[name] for name in ("allgather", "ring")
        }


def test_a_group_of_one_sends_nothing() -> None:
    for cost in predict(Busiest(0, 0, 0), Topology(1, 1), **CALL).values():
        assert cost.fast_bytes == cost.slow_bytes == cost.merged_bytes == 0
        assert math.isfinite(cost.seconds(LINKS))

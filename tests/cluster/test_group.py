"""Room for workers on nodes, and the order of ranks on them."""

import pytest

from dash_dist.cluster import ray_cluster
from dash_dist.cluster.group import rank_envs, rank_order
from dash_dist.cluster.nodes import CPU_WORKER, GPU_WORKER, Node, preemption_notice, room_for_workers
from dash_dist.cluster.processes import ProcessId
from dash_dist.cluster.rank import Place

NODES = [
    Node("a", "10.0.0.1", room=4, free=1),
    Node("b", "10.0.0.2", room=4, free=4),
    Node("c", "10.0.0.3", room=4, free=2, leaves_at=0.0),
]


def test_room_is_what_is_free_and_what_is_held_on_nodes_that_stay():
    assert room_for_workers(NODES) == 5
    assert room_for_workers(NODES, held=["a", "a", "a", "c", "c", "lost"]) == 8


def test_nodes_with_gpus_may_come_after_the_run_has_started(monkeypatch):
    """No worker is placed on the CPUs of a node that came for its GPUs, and GPUs are what is asked for then."""
    nodes = {"CPU": 0, "GPU": 0}
    asked = []

    def alive_nodes(worker):
        room = nodes["GPU" if "GPU" in worker else "CPU"]
        return [Node("a", "10.0.0.1", room=room, free=room)]

    monkeypatch.setattr(ray_cluster, "alive_nodes", alive_nodes)
    monkeypatch.setattr(ray_cluster, "ask_for_nodes", lambda worker, workers: asked.append((worker, workers)))
    cluster = ray_cluster.RayCluster(start_seconds=1, answer_seconds=1)
    assert cluster.look().room == 0
    cluster.ask_for(32)
    nodes.update(CPU=192, GPU=8)
    assert cluster.look().room == 8
    nodes.update(GPU=0)  # taken back
    assert cluster.look().room == 0
    assert asked == [(CPU_WORKER, 32), (GPU_WORKER, 32)]


def test_only_a_node_in_use_gives_a_notice():
    assert preemption_notice(NODES, ["a", "b"]) == ""
    assert preemption_notice(NODES, ["a", "c"]) == "node 10.0.0.3 is about to be taken away"


@pytest.mark.parametrize("gpus", [("0", "2", "10"), ("GPU-0a", "GPU-4c", "MIG-17"), (None, None, None)])
def test_workers_are_ordered_by_node_and_gpu(gpus):
    expected = [("b", gpus[0]), ("b", gpus[2]), ("a", gpus[0]), ("a", gpus[1]), ("a", gpus[2])]
    found = [expected[index] for index in (1, 3, 4, 0, 2)]  # node b is met first
    places = [Place(node, "10.0.0.1", ProcessId(1, 1), gpu) for node, gpu in found]
    ordered = sorted(zip("vwxyz", places, strict=True), key=rank_order(places))
    assert [(place.node_id, place.gpu) for _, place in ordered] == expected


def test_ranks_of_a_node_are_neighbours_and_see_its_gpus():
    places = [Place(node, f"10.0.0.{node}", ProcessId(1, 1), gpu) for node, gpu in [("1", "0"), ("1", "2"), ("2", "1")]]
    found = rank_envs(places, 29400)
    assert [(env.rank, env.local_rank, env.local_world_size, env.gpus) for env in found] == [
        (0, 0, 2, ("0", "2")),
        (1, 1, 2, ("0", "2")),
        (2, 0, 1, ("1",)),
    ]
    assert {(env.master_address, env.master_port, env.world_size) for env in found} == {("10.0.0.1", 29400, 3)}

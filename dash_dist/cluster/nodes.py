"""The nodes of a Ray cluster: which are there, which are about to go, and how many workers each has room for.

Knows Ray's view of the cluster, a second or so old; does not know what the workers do.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

CPU_WORKER: Mapping[str, float] = {"CPU": 1.0}
GPU_WORKER: Mapping[str, float] = {"CPU": 1.0, "GPU": 1.0}


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    Attributes:
        node_id: Ray's, in hexadecimal.
        address: its IP address.
        room: workers it could hold if nothing else ran on it.
        free: additional workers it can hold now.
        leaves_at: when it will be taken away, in seconds since 1970; None if nothing is known of that, 0.0 if the
            time is not.
    """

    node_id: str
    address: str
    room: int
    free: int
    leaves_at: float | None = None


def alive_nodes(worker: Mapping[str, float]) -> list[Node]:
    """The nodes that are alive, with their room for workers that take the resources `worker` each."""
    import ray

    # Ray has no public call for the last two; both are one request to the head.
    state = ray._private.state.state
    available, draining = state.available_resources_per_node(), state.get_draining_nodes()
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            room=_fitting(worker, node["Resources"]),
            free=_fitting(worker, available.get(node["NodeID"], {})),
            leaves_at=draining[node["NodeID"]] / 1000 if node["NodeID"] in draining else None,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def room_for_workers(nodes: Collection[Node], held: Collection[str] = ()) -> int:
    """Workers that would find a place on nodes that stay: the free places and those `held` now, a node id for each."""
    staying = {node.node_id for node in nodes if node.leaves_at is None}
    free = sum(node.free for node in nodes if node.node_id in staying)
    return free + sum(node_id in staying for node_id in held)


def preemption_notice(nodes: Collection[Node], used: Collection[str]) -> str:
    """Which of the `used` nodes, given by id, are about to be taken away, in words that stay the same; "" for none."""
    leaving = sorted(
        (node.leaves_at, node.address) for node in nodes if node.leaves_at is not None and node.node_id in used
    )
    notices = (
        f"node {address} is about to be taken away"
        + (time.strftime(" at %H:%M:%S", time.localtime(when)) if when else "")
        for when, address in leaving
    )
    return "; ".join(notices)


def ask_for_nodes(worker: Mapping[str, float], workers: int) -> None:
    """Tell the cluster's autoscaler, where it has one, that there is work for `workers` workers; 0: for none."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(worker)] * workers)


def _fitting(worker: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0.0) // amount) for name, amount in worker.items())

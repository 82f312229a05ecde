"""Probe of the nodes of a Ray cluster, run as a Ray job: one task on each node, one line of JSON as the answer.

Submitted as text, so that it works where dash-dist is not installed; so it imports nothing but the standard library and
Ray. Argument: the directory of the runs.
"""

import importlib.metadata
import json
import os
import socket
import sys
import time
import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MARK = "dash-dist doctor: "
ROUNDS = 5
NODE_SECONDS = 40


class Node:
    """An actor that is placed on the node it speaks for."""

    def now(self) -> float:
        return time.time()

    def describe(self, path: str, word: str) -> dict[str, Any]:
        versions: dict[str, str | None] = {}
        for name in ("dash-dist", "torch", "ray"):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        try:
            with open(path) as file:
                sees = file.read() == word
        except OSError:
            sees = False
        return {"host": socket.gethostname(), "versions": versions, "sees_directory": sees}


def probe(node_id: str, path: str, word: str) -> dict[str, Any]:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    node = ray.remote(num_cpus=0, scheduling_strategy=there)(Node).remote()
    found = ray.get(node.describe.remote(path, word), timeout=NODE_SECONDS)
    quickest, offset = float("inf"), 0.0
    for _ in range(ROUNDS):
        asked = time.time()
        theirs = ray.get(node.now.remote(), timeout=NODE_SECONDS)
        answered = time.time()
        if answered - asked < quickest:
            quickest, offset = answered - asked, theirs - (asked + answered) / 2
    return {**found, "offset": offset, "uncertainty": quickest / 2}


def main(directory: str) -> None:
    ray.init(log_to_driver=False)
    word = uuid.uuid4().hex
    path = os.path.join(directory, f".doctor-{word}")
    writable = True
    try:
        os.makedirs(directory, exist_ok=True)
        with open(path, "w") as file:
            file.write(word)
    except OSError:
        writable = False
    nodes = []
    try:
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            of_node: dict[str, Any] = {"address": node["NodeManagerAddress"], "gpus": node["Resources"].get("GPU", 0)}
            try:
                of_node.update(probe(node["NodeID"], path, word))
            except Exception as error:  # of one node, whatever it is; the others are still to be asked
                of_node["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            nodes.append(of_node)
    finally:
        if writable:
            os.remove(path)
    print(MARK + json.dumps({"writable": writable, "nodes": nodes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

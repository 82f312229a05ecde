"""A node is lost for good: the run goes on at a smaller data-parallel size, and nobody can tell from its losses."""

import json
import time
from collections import Counter

import pytest
from storm.cluster import LocalCluster
from storm.run import Patience, finish_run, start_run, write_run
from storm.storm import node_environment
from storm.watch import RunWatch
from training_runs import losses, run_rank_processes

STEPS = 24
PATIENCE = Patience(hang=120)

pytestmark = pytest.mark.timeout(900)


def test_a_run_goes_on_with_the_nodes_that_are_left(short_folder, family):
    """Of two nodes of two ranks each (CP=2, DP=2) one stays: CP=2, DP=1, and twice the micro-batches."""
    files = write_run(short_folder, "smaller", steps=STEPS, interval=5, patience=PATIENCE)
    ranks = short_folder / "ranks"
    ranks.mkdir()
    hook = short_folder / "ranks.json"
    hook.write_text(json.dumps({"folder": str(ranks), "step_seconds": 0.3, "poisoned": []}))
    watch = RunWatch(ranks, files.directory)
    with LocalCluster(short_folder, environment=node_environment(hook)) as cluster:
        nodes = [cluster.add_node(cpus=2) for _ in range(2)]
        driver = start_run(cluster, files, PATIENCE, workers=4, node_wait=3)
        deadline = time.monotonic() + 300
        while watch.step < 8:
            assert driver.poll() is None, files.log.read_text()
            assert time.monotonic() < deadline, files.log.read_text()
            time.sleep(0.05)
        assert cluster.lose(nodes[1]) == []
        finish_run(driver, files, seconds=400)
    watch.refresh()
    sizes = {one.step: one.world_size for one in sorted(watch.steps, key=lambda one: one.time)}
    assert (sizes[1], sizes[STEPS]) == (4, 2)
    events = Counter(event.kind for event in watch.events())
    assert events["resized"] == 1
    assert events["restart"] >= 1
    arguments = ["-m", "dash_dist.cli", "train", str(files.config), "run.name=undisturbed", "logging.interval=1"]
    for status, output in run_rank_processes(arguments, 2, seconds=300):
        assert status == 0, output
    undisturbed = losses(files.directory.with_name("undisturbed"))
    assert list(watch.losses()) == list(range(1, STEPS + 1))
    assert watch.losses() == pytest.approx(undisturbed, rel=1e-5)

"""A node is lost for good: the run goes on at a smaller data-parallel size, and nobody can tell from its losses.

And the driver is lost, which nothing but its user or a scheduler replaces.
"""

import json
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.storm.cluster import LocalCluster
from tests.storm.run import Patience, RunFiles, finish_run, start_run, write_run
from tests.storm.storm import node_environment
from tests.storm.watch import RunWatch
from tests.support.runs import losses, run_rank_processes

STEPS = 24
PATIENCE = Patience(answer=120)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def prepare(folder: Path, name: str) -> tuple[RunFiles, RunWatch, Path]:
    """A run's files, what is seen of it, and the settings of its ranks' hook."""
    files = write_run(folder, name, steps=STEPS, interval=5, patience=PATIENCE)
    ranks = folder / f"{name}_ranks"
    ranks.mkdir()
    hook = folder / f"{name}_ranks.json"
    hook.write_text(json.dumps({"folder": str(ranks), "step_seconds": 0.3, "poisoned": []}))
    return files, RunWatch(ranks, files.directory), hook


def wait_for_step(step: int, watch: RunWatch, driver: subprocess.Popen[bytes], files: RunFiles) -> None:
    deadline = time.monotonic() + 300
    while watch.step < step:
        assert driver.poll() is None, files.log.read_text()
        assert time.monotonic() < deadline, files.log.read_text()
        time.sleep(0.05)


def test_a_run_goes_on_with_the_nodes_that_are_left(short_folder, family):
    """Of two nodes of two ranks each (CP=2, DP=2) one stays: CP=2, DP=1, and twice the micro-batches."""
    files, watch, hook = prepare(short_folder, "smaller")
    with LocalCluster(short_folder, environment=node_environment(hook)) as cluster:
        nodes = [cluster.add_node(cpus=2) for _ in range(2)]
        driver = start_run(cluster, files, PATIENCE, workers=4, node_wait=3)
        wait_for_step(8, watch, driver, files)
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


def test_a_lost_driver_leaves_no_rank_behind_and_the_same_command_goes_on(short_folder, family):
    files, watch, hook = prepare(short_folder, "driverless")
    folder = short_folder / "d"
    folder.mkdir()
    with LocalCluster(folder, environment=node_environment(hook)) as cluster:
        cluster.add_node(cpus=2)
        driver = start_run(cluster, files, PATIENCE, workers=2)
        wait_for_step(8, watch, driver, files)
        driver.kill()
        driver.wait(timeout=30)
        watch.wait_until_ended(seconds=60)
        reached = watch.step
        finish_run(start_run(cluster, files, PATIENCE, workers=2), files, seconds=400)
    assert list(watch.losses()) == list(range(1, STEPS + 1))
    (restart,) = watch.events()
    assert restart.kind == "restart"
    assert restart.step == reached // 5 * 5

"""One run over four nodes of a Ray cluster, and over two nodes by the other launchers: the same losses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.storm.cluster import LocalCluster, free_port
from tests.support.runs import TINY, cpu_environment, losses

ROOT = Path(__file__).parents[2]
STEPS = 12
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tree(short_folder):
    """A working tree as a user has it: the code and a configuration, and nothing else on Python's path."""
    tree = short_folder / "tree"
    for package in ("dash_dist", "kernels/dash_kernels"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    config = {
        **TINY,
        "run": {"name": "tiny", "directory": str(short_folder / "runs")},
        "training": {**TINY["training"], "steps": STEPS, "distributed_timeout_seconds": 300},
    }
    (tree / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tree


@pytest.fixture(scope="module")
def cluster(short_folder, family):
    """A head with the dashboard, and four nodes that have room for one worker each."""
    with LocalCluster(short_folder, dashboard=True, environment={"CUDA_VISIBLE_DEVICES": ""}) as cluster:
        for _ in range(4):
            cluster.add_node(cpus=1)
        yield cluster


@pytest.fixture(scope="module")
def of_ray(cluster, tree, short_folder):
    """The losses of the run as a submitted job."""
    command = [
        "dash-dist",
        "submit",
        "tiny.yaml",
        "run.name=ray",
        "--num-workers=4",
        f"--address={cluster.dashboard_url}",
    ]
    done = cluster.run(command, cwd=tree, seconds=600)
    assert done.returncode == 0, done.stdout
    assert f"finished, step {STEPS}" in done.stdout
    assert "tp 1 x cp 2 x pp 1 x dp 2" in done.stdout
    return losses(short_folder / "runs" / "ray")


def test_a_job_on_four_nodes_trains(of_ray):
    assert list(of_ray) == list(range(1, STEPS + 1))
    assert of_ray[STEPS] < 0.9 * of_ray[1]


def test_a_client_without_the_token_is_refused(cluster, tree):
    (cluster.folder / "other_token").write_text("0" * 64)
    command = ["dash-dist", "submit", "tiny.yaml", "run.name=refused", f"--address={cluster.dashboard_url}"]
    done = cluster.run(command, cwd=tree, environment={"RAY_AUTH_TOKEN_PATH": str(cluster.folder / "other_token")})
    assert done.returncode == 1
    assert "refuses this client" in done.stdout


def test_torchrun_on_two_nodes_gives_the_losses_of_ray(of_ray, tree, short_folder):
    environment = {"NNODES": "2", "NPROC": "2", "RENDEZVOUS": f"127.0.0.1:{free_port('127.0.0.1')}"}
    run_on_two_nodes("torchrun", tree, [environment, environment])
    assert losses(short_folder / "runs" / "torchrun") == pytest.approx(of_ray, rel=1e-6)


def test_deepspeed_on_two_nodes_gives_the_losses_of_ray(of_ray, tree, short_folder):
    hostfile = short_folder / "hostfile"
    hostfile.write_text("127.0.0.1 slots=2\n127.0.0.2 slots=2\n")
    environment = {
        "HOSTFILE": str(hostfile),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port("127.0.0.1")),
        "DS_ACCELERATOR": "cpu",
    }
    run_on_two_nodes("deepspeed", tree, [{**environment, "NODE_RANK": rank} for rank in "01"])
    assert losses(short_folder / "runs" / "deepspeed") == pytest.approx(of_ray, rel=1e-6)


def run_on_two_nodes(launcher, tree, environments):
    """`launch/LAUNCHER.sh` once for each of the environments, at the same time; the run is named after the launcher."""
    command = [str(ROOT / "launch" / f"{launcher}.sh"), str(tree / "tiny.yaml"), f"run.name={launcher}"]
    nodes = [
        subprocess.Popen(
            command,
            cwd=tree,
            env=cpu_environment({"PATH": PATH, "OMP_NUM_THREADS": "1", **environment}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for environment in environments
    ]
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert f"finished, step {STEPS}" in "".join(outputs)

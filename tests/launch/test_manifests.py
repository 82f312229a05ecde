"""The files in cluster/ and launch/ are what Ray, KubeRay, Slurm and DeepSpeed read, and start what there is here."""

import copy
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer
import yaml

from dash_dist.cluster.__main__ import app
from dash_dist.config.file import load_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def check_command(command: str) -> None:
    """`python -m dash_dist.cluster ...` with arguments that the command takes and a configuration that is accepted."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dash_dist.cluster"]
    arguments = typer.main.get_command(app).make_context("cluster", words[3:]).params
    config = load_config(ROOT / arguments["config"], arguments["overrides"])
    assert config.run.directory.is_absolute()
    config.check_world_size(arguments["num_workers"])


@pytest.mark.parametrize("name", ["ray_on_premise.yaml", "ray_aws.yaml"])
def test_ray_accepts_its_cluster_files(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / name).read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    starts = [command for kind in ("head", "worker") for command in config[f"{kind}_start_ray_commands"]]
    ray_starts = [command for command in starts if "ray start" in command]
    assert len(ray_starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in ray_starts)
    assert "--dashboard-host=127.0.0.1" in ray_starts[0]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_the_rayjob_starts_a_run_on_gpus_with_a_token_and_shared_storage():
    job = yaml.safe_load((CLUSTER / "kuberay_rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    check_command(spec["entrypoint"])
    assert spec["backoffLimit"] > 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    [workers] = cluster["workerGroupSpecs"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    for pod in pods:
        [container] = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert pod["terminationGracePeriodSeconds"] > 30  # the time Ray takes to drain a node
    gpus = int(pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) * workers["maxReplicas"]
    words = shlex.split(spec["entrypoint"])
    assert int(words[words.index("--num-workers") + 1]) == gpus


def test_deepspeed_reads_the_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(CLUSTER / "hostfile.example"))) == {f"node{index}": 8 for index in range(4)}


FAKES = {
    # Steps that run a command on a node stay there until they are ended.
    "srun": 'case "$*" in *hostname*) echo 10.0.0.1;; *) exec sleep 300;; esac',
    "scontrol": '[[ $1 != show ]] || printf "node%s\\n" 0 1',
    # The steps are started in the background: the cluster answers, and the driver goes on, once they are there.
    "ray": 'until grep -q "ray start --head" "$CALLS"; do sleep 0.05; done',
    "python": 'until grep -q "ray start --address" "$CALLS"; do sleep 0.05; done\n'
    'trap "exit 0" TERM; [[ $3 != failing.yaml ]] || exit 3; while :; do sleep 0.1; done',
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch script whose commands write down how they were called, and what they wrote."""
    commands = tmp_path / "bin"
    commands.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    for name, body in FAKES.items():
        path = commands / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $* [${{RAY_ADDRESS:-}}]" >> {calls}\n{body}\n')
        path.chmod(0o755)
    environment = {
        **os.environ,
        "VENV": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "RAY_ADDRESS": "",
        "CALLS": str(calls),
    }
    return environment, calls


def run_batch(slurm, config: str, *, notice: signal.Signals | None) -> tuple[int, str]:
    """Exit status of the batch script and the calls it made; `notice` is sent once the driver runs."""
    environment, calls = slurm
    script = subprocess.Popen(
        [str(CLUSTER / "slurm_ray.sbatch"), config, "run.name=x", "--min-workers", "8"],
        env=environment,
        start_new_session=True,
    )
    try:
        if notice is not None:
            deadline = time.monotonic() + 60
            while "python" not in calls.read_text():
                assert time.monotonic() < deadline, calls.read_text()
                time.sleep(0.1)
            time.sleep(0.5)  # until the fake driver has set its trap
            script.send_signal(notice)
        status = script.wait(timeout=60)
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
            script.wait()
    return status, calls.read_text()


def test_a_slurm_job_starts_ray_on_every_node_and_the_run_on_it(slurm):
    status, calls = run_batch(slurm, "failing.yaml", notice=None)
    assert status == 3
    assert "requeue" not in calls
    head = (
        "srun --nodes=1 --ntasks=1 --nodelist=node0 --overlap ray start --head --node-ip-address 10.0.0.1 --port 20007"
    )
    assert f"{head} --include-dashboard=false --block" in calls
    assert "--nodelist=node1 --overlap ray start --address 10.0.0.1:20007 --block" in calls
    assert "python -m dash_dist.cluster failing.yaml run.name=x --min-workers 8 [10.0.0.1:20007]" in calls


def test_a_slurm_job_that_is_preempted_lets_the_run_save_and_is_requeued(slurm):
    status, calls = run_batch(slurm, "run.yaml", notice=signal.SIGUSR1)
    assert status == 0
    assert "scontrol requeue 7" in calls


def test_a_slurm_job_that_is_cancelled_lets_the_run_save_and_ends(slurm):
    status, calls = run_batch(slurm, "run.yaml", notice=signal.SIGTERM)
    assert status == 0
    assert "requeue" not in calls

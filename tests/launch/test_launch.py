"""Every launcher ends in the same training: the same losses, whoever started the processes."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dash_dist.run.events import EventLog
from tests.support.cases import exhaustive
from tests.support.ranks import free_port
from tests.support.runs import cpu_environment, losses, run_command, write_config

ROOT = Path(__file__).parents[2]
STEPS = 12
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
# The launchers are found beside the interpreter, whether or not its environment is activated.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def listening(process: psutil.Process) -> list[tuple[str, str]]:
    """Name and address of everything that a process and what it started listens on."""
    found = []
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that wrote a checkpoint may just have ended
            found += [
                (one.name(), connection.laddr.ip)
                for connection in one.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    return found


def overrides(name: str) -> list[str]:
    return [f"run.name={name}", f"training.steps={STEPS}", "checkpoint.interval=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the tiny model, `torchrun`, by torchrun.sh on two processes."""
    folder = tmp_path_factory.mktemp("launch")
    config = str(write_config(folder))
    command = [str(ROOT / "launch" / "torchrun.sh"), config, *overrides("torchrun")]
    done = run_command(command, {"PATH": PATH, "NPROC": "2"})
    assert done.returncode == 0, done.stdout
    assert f"finished, step {STEPS}" in done.stdout
    return folder


@pytest.mark.slow
def test_deepspeed_gives_the_losses_of_torchrun(folder):
    command = [str(ROOT / "launch" / "deepspeed.sh"), str(folder / "tiny.yaml"), *overrides("deepspeed")]
    environment = {"PATH": PATH, "NPROC": "2", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    done = run_command(command, environment)
    assert done.returncode == 0, done.stdout
    assert f"finished, step {STEPS}" in done.stdout
    assert losses(folder / "runs" / "deepspeed") == pytest.approx(losses(folder / "runs" / "torchrun"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", exhaustive(["torchrun.sh", "deepspeed.sh"], ["torchrun.sh"]))
def test_on_one_machine_the_launchers_listen_on_loopback_only(folder, tmp_path, script):
    command = [str(ROOT / "launch" / script), str(folder / "tiny.yaml"), *overrides(f"listening_{script}")]
    environment = {"PATH": PATH, "NPROC": "2", "MASTER_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    found: list[tuple[str, str]] = []
    with subprocess.Popen(
        command,
        env=cpu_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as driver:
        try:
            lines = []
            for line in driver.stdout:
                lines.append(line)
                if line.startswith(f"step 6/{STEPS}"):
                    found = listening(psutil.Process(driver.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
    assert f"finished, step {STEPS}" in "".join(lines), "".join(lines)
    assert len(found) > 2  # where the ranks met, and both of them
    assert {address for _, address in found} <= LOOPBACK, found
    assert not list(tmp_path.rglob("store"))  # they met through a file


@pytest.mark.ray
def test_ray_gives_the_losses_of_torchrun_although_a_worker_is_killed(folder):
    """One worker is killed after step 6: all start again from the checkpoint of step 4, and nothing else changes.

    Nothing that was started listens on anything but loopback.
    """
    script = [sys.executable, str(ROOT / "launch" / "ray_train.py")]
    command = [*script, str(folder / "tiny.yaml"), *overrides("ray"), "run.resume=never", "--num-workers=2"]
    environment = cpu_environment({"RAY_ADDRESS": ""})
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    processes = psutil.Process(driver.pid)
    lines, killed = [], False
    try:
        for line in driver.stdout:
            lines.append(line)
            if line.startswith(f"step 1/{STEPS}"):  # five steps early: looking around takes a while
                workers = [p for p in processes.children(recursive=True) if "RankProcess" in " ".join(p.cmdline())]
                assert len(workers) == 2
            if line.startswith(f"step 6/{STEPS}") and not killed:
                killed = True
                for worker in workers:
                    worker.suspend()
                found = listening(processes)
                assert len(found) > 5  # Ray's head, node and agents, and where the ranks met
                assert {address for _, address in found} <= LOOPBACK, found
                workers[1].kill()
                workers[0].resume()
        status = driver.wait(timeout=30)
    finally:
        started = [processes, *processes.children(recursive=True)] if driver.poll() is None else []
        for process in started:
            process.send_signal(signal.SIGKILL)
        driver.communicate()
    output = "".join(lines)
    assert status == 0, output
    assert re.search(r"^resumed from .*step_00000004 at step 4$", output, re.MULTILINE), output
    assert f"finished, step {STEPS}" in output
    assert losses(folder / "runs" / "ray") == pytest.approx(losses(folder / "runs" / "torchrun"), rel=1e-5)
    restart, resumed = EventLog(folder / "runs" / "ray").read()
    assert (restart.kind, restart.step, restart.attempt, resumed.kind) == ("restart", 4, 1, "resumed")
    named = r"attempt 1 \(2 processes\) was lost: rank \d \(process \d+ on [\d.]+\) died: "
    assert re.match(named, restart.message), restart.message
    assert re.search(r"attempt 2 .*step_00000004; steps done again: \d$", resumed.message), resumed.message


@pytest.mark.ray
def test_ray_starts_the_deepspeed_engine(folder):
    script = [sys.executable, str(ROOT / "launch" / "ray_train.py")]
    command = [*script, str(folder / "tiny.yaml"), *overrides("ray_deepspeed"), "engine=deepspeed", "--num-workers=2"]
    done = run_command(command, {"RAY_ADDRESS": ""})
    assert done.returncode == 0, done.stdout
    assert losses(folder / "runs" / "ray_deepspeed") == pytest.approx(losses(folder / "runs" / "torchrun"), rel=1e-4)


@pytest.mark.ray
def test_the_demo_learns(tmp_path):
    """A short form of `make demo`: 10 of its steps."""
    short = ["training.steps=10", "optimizer.warmup_steps=4", "logging.interval=1", f"run.directory={tmp_path}"]
    command = [str(ROOT / "launch" / "torchrun.sh"), str(ROOT / "configs" / "demo.yaml"), *short]
    done = run_command(command, {"PATH": PATH, "NPROC": "2", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    curve = losses(tmp_path / "demo")
    assert 5.0 < curve[1] < 6.5  # ln(256) = 5.55
    assert max(curve[9], curve[10]) < 4.2


def test_ray_refuses_a_bad_setting_before_ray_is_started(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "ray_train.py"), str(write_config(tmp_path)), "training.stepz=1"]
    done = run_command(command, {}, seconds=60)
    assert done.returncode == 2
    assert done.stdout.startswith("error: ")
    assert "did you mean training.steps?" in done.stdout


def test_a_cluster_that_is_not_there_is_reported_at_once(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "ray_train.py"), str(write_config(tmp_path))]
    address = f"127.0.0.1:{free_port()}"
    done = run_command(command, {"RAY_ADDRESS": address})
    assert done.returncode == 1
    assert done.stdout.startswith(f"error: cannot connect to the Ray cluster at RAY_ADDRESS={address}")


@pytest.mark.parametrize("script", ["launch/torchrun.sh", "launch/deepspeed.sh", "cluster/ray_job.sh"])
def test_a_script_without_a_configuration_shows_its_usage(script):
    done = run_command([str(ROOT / script)], {}, seconds=20)
    assert done.returncode == 2
    assert f"{script} " in done.stdout
    assert "CONFIG [key=value ...]" in done.stdout


def test_torchrun_on_several_nodes_needs_a_rendezvous():
    done = run_command([str(ROOT / "launch" / "torchrun.sh"), "x.yaml"], {"NNODES": "2"}, seconds=20)
    assert done.returncode == 2
    assert "needs RENDEZVOUS=host:port" in done.stdout


def test_a_ray_job_passes_the_arguments_on():
    script = str(ROOT / "cluster" / "ray_job.sh")
    arguments = ["configs/demo.yaml", "run.name=a b", "--num-workers", "4"]
    environment = {"RAY_ADDRESS": "http://head:8265", "RAY_AUTH_MODE": "disabled"}
    done = run_command([script, "--dry-run", *arguments], environment, seconds=20)
    words = shlex.split(done.stdout)
    runtime = json.loads(words[words.index("--runtime-env-json") + 1])
    assert runtime["env_vars"] == {
        "RAY_AUTH_MODE": "disabled",
        "RAY_JOB_STOP_WAIT_TIME_S": "600",
        "PYTHONPATH": "kernels",
    }
    assert {".git", ".venv", "runs"} < set(runtime["excludes"])
    assert words[:3] == ["ray", "job", "submit"]
    assert words[words.index("--") + 1 :] == ["python", "launch/ray_train.py", *arguments]


def test_a_ray_job_needs_an_address():
    done = run_command([str(ROOT / "cluster" / "ray_job.sh"), "x.yaml"], {"RAY_ADDRESS": ""}, seconds=20)
    assert done.returncode == 2
    assert "RAY_ADDRESS is not set" in done.stdout

"""Whole runs with `engine: deepspeed`: other launchers, another ZeRO stage after a resume, and the same losses."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.ranks import free_port
from tests.support.runs import losses, run_command, write_config

LAUNCH = Path(__file__).parents[2] / "launch"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
STEPS = 8
SETTINGS = [f"training.steps={STEPS}", "checkpoint.interval=4"]

# Each starts a launcher and two processes: seconds on idle cores, minutes on busy ones.
TIME_LIMIT = 400.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * TIME_LIMIT)]


def launch(script: str, folder: Path, name: str, *settings: str) -> tuple[int, str]:
    command = [str(LAUNCH / script), str(folder / "tiny.yaml"), f"run.name={name}", *SETTINGS, *settings]
    done = run_command(command, {"PATH": PATH, "NPROC": "2", "MASTER_PORT": str(free_port())}, seconds=TIME_LIMIT)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of the tiny model by each engine: `megatron` by torchrun.sh, `deepspeed` by deepspeed.sh with ZeRO-2."""
    folder = tmp_path_factory.mktemp("deepspeed_runs")
    write_config(folder)
    status, output = launch("torchrun.sh", folder, "megatron")
    assert status == 0, output
    status, output = launch("deepspeed.sh", folder, "deepspeed", "engine=deepspeed", "deepspeed.zero_stage=2")
    assert status == 0, output
    return folder


def test_both_engines_give_the_same_losses(folder):
    expected = losses(folder / "runs" / "megatron")
    assert losses(folder / "runs" / "deepspeed") == pytest.approx(expected, rel=1e-5)
    assert list(expected) == list(range(1, STEPS + 1))


def test_a_run_goes_on_with_another_launcher_and_another_stage(folder):
    runs = folder / "runs"
    shutil.copytree(runs / "deepspeed", runs / "resumed")
    shutil.rmtree(runs / "resumed" / "checkpoints" / f"step_{STEPS:08d}")
    status, output = launch("torchrun.sh", folder, "resumed", "engine=deepspeed", "deepspeed.zero_stage=3")
    assert status == 0, output
    assert "resumed from" in output
    assert "at step 4" in output
    assert losses(runs / "resumed") == pytest.approx(losses(runs / "megatron"), rel=1e-5)


def test_the_other_engine_refuses_the_run_in_words(folder):
    shutil.copytree(folder / "runs" / "deepspeed", folder / "runs" / "other")
    command = [sys.executable, "-m", "dash_dist.cli", "train", str(folder / "tiny.yaml"), "run.name=other"]
    done = run_command([*command, "parallel.context=1", "training.steps=9"], {}, seconds=TIME_LIMIT)
    assert done.returncode == 1
    assert "was written by engine: deepspeed and this run has engine: megatron" in done.stdout
    assert "Traceback" not in done.stdout

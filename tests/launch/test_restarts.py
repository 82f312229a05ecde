"""Launchers that fail, and the process that starts them again: torchrun and DeepSpeed are scripts here."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dash_dist.run.events import Event, EventLog
from tests.support.runs import cpu_environment, run_command, write_config

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
SCRIPTS = [("torchrun.sh", "torchrun"), ("deepspeed.sh", "deepspeed")]

LAUNCHER = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
calls, run = Path("{calls}"), Path("{run}")
with calls.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
start = len(calls.read_text().splitlines())  # 1 for the first
def begin(host="{host}"):
    record = dict(attempt=start, started=0.0, host=host, pid=1, world_size=2, step=3)
    (run / "attempt.json").write_text(json.dumps(record))
def save(step):
    (run / "checkpoints" / f"step_{{step:08d}}").mkdir(parents=True)
"""


class Launchers:
    """Both launchers as scripts in `folder`. They note their arguments and run `body`, which may `begin` and `save`."""

    def __init__(self, folder: Path, body: str) -> None:
        self.config = write_config(folder)
        self.run_directory = folder / "runs" / "tiny"
        self.calls = folder / "calls"
        start = LAUNCHER.format(python=sys.executable, calls=self.calls, run=self.run_directory, host=HOST)
        for _, launcher in SCRIPTS:
            path = folder / launcher
            path.write_text(f"{start}\n{body}\n")
            path.chmod(0o755)
        self.environment = {
            "PATH": os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"])),
            "NPROC": "1",
            "RENDEZVOUS": "node0:1",
            "RESTART_PAUSE": "0",
        }

    def run(self, script: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "launch" / script), str(self.config), *overrides]
        return run_command(command, self.environment | environment, seconds=60)

    def starts(self) -> list[str]:
        return self.calls.read_text().splitlines()

    def events(self) -> list[Event]:
        return EventLog(self.run_directory).read()


@pytest.mark.parametrize(
    ("script", "given"), [("torchrun.sh", "--rdzv-endpoint node0:1"), ("deepspeed.sh", "--num_accelerators 1")]
)
@pytest.mark.parametrize(("restarts", "status", "starts"), [(0, 3, 1), (1, 3, 2), (2, 0, 3), (5, 0, 3)])
def test_a_launcher_is_started_again_until_the_run_succeeds(tmp_path, script, given, restarts, status, starts):
    """A launcher that fails twice."""
    launchers = Launchers(tmp_path, "sys.exit(3 if start < 3 else 0)")
    done = launchers.run(script, RESTARTS=str(restarts))
    assert done.returncode == status, done.stdout
    calls = launchers.starts()
    assert len(calls) == starts
    assert all(given in call and call.endswith(f"dash_dist.cli train {launchers.config}") for call in calls)
    kinds = [event.kind for event in launchers.events()]
    assert kinds == ["restart"] * min(restarts, 2) + ["failed"] * (status != 0)


@pytest.mark.parametrize(("script", "launcher"), SCRIPTS)
def test_a_launcher_is_not_started_again_for_what_trying_again_cannot_mend(tmp_path, script, launcher):
    """A launcher that dies once and is then refused, as `dash-dist train` records it."""
    refusal = """
if start == 2:
    event = dict(time=time.time(), kind="failed", step=None, message="lower optimizer.lr")
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + chr(10))
sys.exit(1)
"""
    launchers = Launchers(tmp_path, refusal)
    done = launchers.run(script, RESTARTS="9")
    assert done.returncode == 1, done.stdout
    assert len(launchers.starts()) == 2
    assert [event.kind for event in launchers.events()] == ["restart", "failed"]


@pytest.mark.parametrize(("script", "launcher"), SCRIPTS)
@pytest.mark.parametrize(
    ("death", "status"), [("sys.exit(1)", "1"), ("os.kill(os.getpid(), signal.SIGKILL)", "137 (SIGKILL)")]
)
def test_the_event_log_says_why_a_launcher_was_started_again(tmp_path, script, launcher, death, status):
    launchers = Launchers(tmp_path, f"begin()\nif start == 1:\n    save(2)\n    {death}")
    done = launchers.run(script, RESTARTS="1")
    assert done.returncode == 0, done.stdout
    (event,) = launchers.events()
    assert (event.kind, event.step, event.attempt) == ("restart", 2, 1)
    assert event.message == f"attempt 1 (2 processes) was lost: {launcher} on {HOST} ended with status {status}"


def test_the_event_log_names_the_rank_that_the_launcher_reports(tmp_path):
    body = """
begin()
if start == 1:
    Path(os.environ["DASH_DIST_FAILED_RANK"]).write_text("rank 1 ended by SIGKILL")
sys.exit(start < 3)
"""
    launchers = Launchers(tmp_path, body)
    done = launchers.run("torchrun.sh", RESTARTS="2")
    assert done.returncode == 0, done.stdout
    named, unnamed = (event.message for event in launchers.events())
    assert named.endswith(f"torchrun on {HOST} ended with status 1 after rank 1 ended by SIGKILL")
    assert unnamed.endswith("ended with status 1")


@pytest.mark.slow
@pytest.mark.parametrize(("end", "name"), [("os.kill(os.getpid(), 9)", "by SIGKILL"), ("sys.exit(3)", "with status 3")])
def test_torchrun_of_one_machine_reports_the_rank_that_failed(tmp_path, end, name):
    rank, report = tmp_path / "rank.py", tmp_path / "report"
    rank.write_text(f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {end}\ntime.sleep(100)\n")
    command = [sys.executable, str(ROOT / "launch" / "local_torchrun.py"), "--nproc-per-node", "2", str(rank)]
    assert run_command(command, {"DASH_DIST_FAILED_RANK": str(report)}, seconds=90).returncode == 1
    assert report.read_text() == f"rank 1 ended {name}"


def test_failures_after_a_new_checkpoint_do_not_count(tmp_path):
    launchers = Launchers(tmp_path, "begin()\nsave(start)\nsys.exit(start < 5)")
    done = launchers.run("torchrun.sh", RESTARTS="1")
    assert done.returncode == 0, done.stdout
    assert len(launchers.starts()) == 5
    assert [call.partition("--rdzv-id ")[2].split()[0] for call in launchers.starts()] == [
        f"dash-dist-{attempt}" for attempt in range(5)
    ]


@pytest.mark.parametrize(("host", "recorded"), [(HOST, 1), ("another", 0)])
def test_of_several_nodes_that_of_the_first_rank_records(tmp_path, host, recorded):
    launchers = Launchers(tmp_path, f"begin('{host}')\nsys.exit(start < 2)")
    done = launchers.run("torchrun.sh", RESTARTS="1", NNODES="2")
    assert done.returncode == 0, done.stdout
    assert len(launchers.events()) == recorded


@pytest.mark.parametrize(("saved", "resume"), [(False, "run.resume=auto"), (True, "run.resume=never")])
def test_a_new_run_resumes_only_from_its_own_checkpoints(tmp_path, saved, resume):
    launchers = Launchers(tmp_path, "sys.exit(start < 2)")
    if saved:
        (launchers.run_directory / "checkpoints" / "step_00000004").mkdir(parents=True)
    done = launchers.run("torchrun.sh", "run.resume=never", RESTARTS="1")
    assert done.returncode == 0, done.stdout
    assert all(call.endswith(f"{launchers.config} {resume}") for call in launchers.starts())


def test_a_refused_configuration_starts_no_launcher(tmp_path):
    launchers = Launchers(tmp_path, "")
    done = launchers.run("deepspeed.sh", "training.stepz=1")
    assert done.returncode == 2
    assert "did you mean training.steps?" in done.stdout
    assert not launchers.calls.exists()


@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_signal_lets_the_run_save_and_ends_the_restarts(tmp_path, script, notice):
    """The launcher needs a second to save, and ends with status 1, as torchrun does."""
    body = """
def stop(*_):
    time.sleep(1)
    (run / "saved").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(run / "ready").touch()
time.sleep(60)
"""
    launchers = Launchers(tmp_path, body)
    process = subprocess.Popen(
        [str(ROOT / "launch" / script), str(launchers.config)],
        env=cpu_environment(launchers.environment | {"RESTARTS": "3"}),
        start_new_session=True,
    )
    try:
        wait_for(launchers.run_directory / "ready")
        process.send_signal(notice)
        assert process.wait(timeout=120) == 1
    finally:
        process.kill()
        process.wait()
    assert (launchers.run_directory / "saved").exists()
    assert len(launchers.starts()) == 1
    assert launchers.events() == []


def test_a_killed_supervisor_leaves_no_launcher_behind(tmp_path):
    body = """
def stop(*_):
    (run / "told").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(run / "ready").touch()
time.sleep(60)
"""
    launchers = Launchers(tmp_path, body)
    command = [str(ROOT / "launch" / "torchrun.sh"), str(launchers.config)]
    process = subprocess.Popen(command, env=cpu_environment(launchers.environment), start_new_session=True)
    wait_for(launchers.run_directory / "ready")
    process.kill()
    process.wait()
    wait_for(launchers.run_directory / "told")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)

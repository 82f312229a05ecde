"""`dash-dist submit`: what is checked first, what is packed, and a job on a head that asks for a token."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dash_dist.cluster import working_tree
from dash_dist.cluster.limits import Limits
from dash_dist.cluster.submit import describe, prepare_submission
from dash_dist.errors import ConfigError
from tests.support.ranks import free_port
from tests.support.runs import cpu_environment, losses, write_config

TOKEN = "a-token-of-more-than-thirty-two-characters"
HEAD_STARTS = 4
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture
def tree(tmp_path):
    """A working tree with the tiny run, of git, and with some of what does not belong into a job."""
    root = tmp_path / "tree"
    (root / "configs").mkdir(parents=True)
    write_config(root).rename(root / "configs" / "tiny.yaml")
    for name in (
        "kernels/dash_kernels/__init__.py",
        "runs/x/big.bin",
        "tests/t.py",
        "ignored/data.bin",
        "data/a b.txt",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (root / ".gitignore").write_text("ignored/\n")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def packed(root: Path, *exclude: str) -> list[str]:
    return [path.as_posix() for path in working_tree.files_to_pack(root, exclude)]


def test_what_git_ignores_and_what_is_no_code_stays_here(tree):
    expected = [".gitignore", "configs/tiny.yaml", "data/a b.txt", "kernels/dash_kernels/__init__.py"]
    assert packed(tree) == expected
    assert packed(tree, "data/*") == [name for name in expected if not name.startswith("data")]


def test_a_tree_without_git_is_packed_whole(tree):
    shutil.rmtree(tree / ".git")
    assert "ignored/data.bin" in packed(tree)
    assert "runs/x/big.bin" not in packed(tree)


def test_the_archive_holds_the_files(tree, tmp_path):
    files = working_tree.files_to_pack(tree)
    working_tree.pack(tree, files, tmp_path / "tree.zip")
    with zipfile.ZipFile(tmp_path / "tree.zip") as archive:
        assert archive.namelist() == [path.as_posix() for path in files]
        assert archive.read("data/a b.txt") == b"x"


def test_a_tree_that_is_too_large_is_refused_with_its_largest_folders(tree):
    with (tree / "data" / "corpus.bin").open("wb") as file:
        file.truncate(working_tree.MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"is 100 MiB .* largest are data \(100 MiB\), .*--exclude 'FOLDER/\*'"):
        packed(tree)


def submission(tree: Path, *overrides: str, **limits: float):
    return prepare_submission(tree / "configs" / "tiny.yaml", overrides, limits=Limits(**limits), exclude=(), root=tree)


def test_the_job_runs_what_was_given(tree):
    text = describe(submission(tree, "run.name=a", "training.steps=30", num_workers=4), None)
    command = "python -m dash_dist.cluster configs/tiny.yaml run.name=a training.steps=30 --num-workers 4"
    assert f"entrypoint   {command}\n" in text
    assert '"PYTHONPATH": "kernels"' in text
    assert "4 files" in text


def test_limits_are_passed_on_as_they_are(tree):
    """Large whole numbers too: the job's command line takes no 1e+06 for one."""
    entrypoint = submission(tree, max_failures=1_000_000, node_wait_seconds=1_234_567.5).entrypoint
    assert entrypoint.endswith(" --max-failures 1000000 --node-wait-seconds 1234567.5")


@pytest.mark.parametrize(
    ("overrides", "limits", "message"),
    [
        (["training.stepz=1"], {}, "did you mean training.steps"),
        (["run.directory=runs"], {}, "run.directory = runs is relative"),
        ([], {"num_workers": 3}, "--num-workers 3: "),
        ([], {"num_workers": 2, "min_workers": 4}, "--min-workers 4 is above --num-workers 2"),
    ],
)
def test_what_cannot_work_is_refused_before_a_cluster_is_asked(tree, overrides, limits, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        submission(tree, *overrides, **limits)


def test_a_configuration_outside_the_tree_is_refused(tree, tmp_path):
    outside = write_config(tmp_path)
    with pytest.raises(ConfigError, match="is not in the tree that the job takes along"):
        prepare_submission(outside, (), limits=Limits(), exclude=(), root=tree)


class Head:
    """A Ray head of this machine, on loopback, that asks for TOKEN; `address` is its dashboard's."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self.process = process
        self.address = address

    def listening(self) -> set[str]:
        """Addresses that its processes listen on."""
        head = psutil.Process(self.process.pid)
        found = set()
        for process in [head, *head.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # one that ended meanwhile
                connections = process.net_connections(kind="inet")
                found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
        return found


def environment(**changes: str) -> dict[str, str]:
    variables = cpu_environment({"RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"})
    variables.pop("RAY_ADDRESS", None)
    # The head, and with it the job, finds `python` beside the interpreter of this test.
    return {**variables, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **changes}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Ray allows a node 30 s to start, which a busy machine may exceed: it is started anew then."""
    for _ in range(HEAD_STARTS):
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # its sockets' names must be short
        found = start_head(folder)
        try:
            log = folder / "head.log"
            while "Ray runtime started" not in log.read_text() and found.process.poll() is None:
                time.sleep(0.5)
            if found.process.poll() is None:
                yield found
                return
            reason = log.read_text()
        finally:
            started = [psutil.Process(found.process.pid)] if found.process.poll() is None else []
            started += [child for parent in started for child in parent.children(recursive=True)]
            for one in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            found.process.wait()
            psutil.wait_procs(started, timeout=20)
            shutil.rmtree(folder, ignore_errors=True)
    pytest.fail(f"Ray's head does not start:\n{reason}")


def start_head(folder: Path) -> Head:
    dashboard = free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2"]
    for option in ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"):
        command += [f"--{option}", str(free_port())]
    command += ["--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1", "--temp-dir", str(folder)]
    command += ["--metrics-export-port", str(free_port()), "--object-store-memory", str(128 << 20)]
    variables = environment(RAY_AUTH_MODE="token", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_worker_niceness="0")
    with (folder / "head.log").open("wb") as output:
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Head(process, f"http://127.0.0.1:{dashboard}")


def run_submit(tree: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dash_dist.cli", "submit", "configs/tiny.yaml", *arguments]
    return subprocess.run(
        command, cwd=tree, env=environment(**changes), capture_output=True, text=True, timeout=240, check=False
    )


def test_a_head_that_is_not_there_is_reported(tree):
    done = run_submit(tree, "--address", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "error: no Ray dashboard answers at http://127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def has_steps(run: Path) -> bool:
    """Whether the run has done, and written down, a step."""
    with contextlib.suppress(KeyError):
        return run.joinpath("tensorboard").is_dir() and bool(losses(run))
    return False


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_is_submitted_with_a_token_followed_and_stopped(tree, head):
    """A wrong token is refused. The run goes on until `ray job stop`; then it saves, and the same command goes on."""
    refused = run_submit(tree, "--address", head.address, RAY_AUTH_TOKEN="another-token-of-more-than-32-characters")
    assert refused.returncode == 1
    assert "refuses this client" in refused.stderr
    assert "Traceback" not in refused.stderr

    run = tree / "runs" / "tiny"
    shutil.rmtree(tree / "kernels")  # this tree's is empty; the installed one is used
    only_at_the_end = "checkpoint.interval=100000"
    endless = run_submit(
        tree, "training.steps=100000", only_at_the_end, "--num-workers=2", "--address", head.address, "--no-follow"
    )
    assert endless.returncode == 0, endless.stderr
    job = re.search(r"^submitted (\S+)$", endless.stdout, re.MULTILINE)[1]
    deadline = time.monotonic() + 200
    while not has_steps(run):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert head.listening() <= LOOPBACK
    stop = [str(Path(sys.executable).with_name("ray")), "job", "stop", "--address", head.address, job]
    stopped = subprocess.run(
        stop, env=environment(RAY_AUTH_MODE="token"), capture_output=True, text=True, timeout=200, check=False
    )
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    [saved] = run.glob("checkpoints/step_*")
    step = int(saved.name.removeprefix("step_"))

    done = run_submit(tree, f"training.steps={step + 2}", "--num-workers=2", "--address", head.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {step}\n" in done.stdout
    assert f"finished, step {step + 2}" in done.stdout

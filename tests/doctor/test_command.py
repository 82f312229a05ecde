"""`dash-dist doctor` as a person calls it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from dash_dist.doctor import Finding, Report, Site, Status, diagnose
from dash_dist.doctor.command import show
from tests.support.runs import cpu_environment, write_config


def listening_elsewhere(process: psutil.Process) -> set[str]:
    """Addresses beyond loopback that a process or what it started listens on."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            connections = one.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        addresses = {each.laddr.ip.removeprefix("::ffff:") for each in connections if each.status == "LISTEN"}
        found |= {f"{one.name()} {address}" for address in addresses if not address.startswith(("127.", "::1"))}
    return found


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_a_healthy_machine(tmp_path):
    """Every check runs, none fails, nothing stays behind, and nothing listens beyond loopback meanwhile."""
    runs, out = tmp_path / "runs", tmp_path / "doctor.json"
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "dash_dist.cli", "doctor", str(config), "training.steps=5", "--json", str(out)]
    environment = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "", "RAY_ADDRESS": ""}
    process = subprocess.Popen(
        command, env=cpu_environment(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watched, elsewhere = psutil.Process(process.pid), set()
    deadline = time.monotonic() + 500
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline
            elsewhere |= listening_elsewhere(watched)
            time.sleep(0.2)
        output, _ = process.communicate()
    finally:
        started = watched.children(recursive=True) if watched.is_running() else []
        for one in started:
            one.kill()
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert elsewhere == set()
    report = json.loads(out.read_text())
    assert report["healthy"]
    found = {one["name"]: one for one in report["findings"]}
    tried = ("data", "versions", "import megatron.core", "import ray", "import deepspeed", "all-reduce (gloo)")
    tried += ("all-to-all (gloo)", "clocks of the ranks", "CP on = CP off (gloo)", "atomic rename", "free space")
    tried += ("directory seen by all ranks", "Ray", "Ray authentication", "tokenizer", f"storage of {runs}")
    for name in tried:
        assert found[name]["status"] in ("ok", "warning"), found[name]
    for name in ("GPUs", "GPU clocks", "Triton cache", "Triton kernels", "collectives (NCCL)", "CP on = CP off (NCCL)"):
        assert (found[name]["status"], found[name]["text"]) == ("skipped", "no CUDA device")
    assert found["CP on = CP off (gloo)"]["value"] < 1e-10
    assert "0 failures" in output
    assert not runs.exists()


def test_the_settings_that_are_refused_and_the_exit_status(tmp_path):
    """A run's mistake is a finding, beside what else is wrong: here nothing else is looked at."""
    report = diagnose(Site(ranks=2, gpus=0, directory=tmp_path), refused="training.stepz: there is no such", checks={})
    (finding,) = report.findings
    assert (finding.status, report.healthy) == (Status.FAILURE, False)
    assert "training.stepz" in json.loads(report.to_json())["findings"][0]["text"]


def test_the_table_shows_every_finding_and_what_to_do(tmp_path):
    findings = [
        Finding("a disk", Status.OK, "fast [really]", 2.0, "GB/s"),
        Finding("a link", Status.WARNING, "slow", advice="Look at the cable."),
        Finding("a clock", Status.FAILURE, "wrong", advice="Set it."),
        Finding("a GPU", Status.SKIPPED, "no CUDA device"),
    ]
    path = tmp_path / "table"
    with path.open("w") as file:
        show(Report({"things": findings}, 12.3), Console(file=file, width=100))
    text = path.read_text()
    assert "fast [really]" in text
    assert text.index("failure a clock: Set it.") < text.index("warning a link: Look at the cable.")
    assert "1 failures, 1 warnings, 1 ok, 1 skipped, in 12 s" in text


def test_a_failure_says_what_to_do():
    with pytest.raises(ValueError, match="does not say what to do"):
        Finding("a clock", Status.FAILURE, "wrong")


def test_a_pytorch_that_cannot_be_loaded_is_named_without_a_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "dash_dist.cli", "doctor"],
        env=cpu_environment({"PYTHONPATH": f"{path}{os.pathsep}{root}{os.pathsep}{root / 'kernels'}"}),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "libcudart.so.12" in done.stderr
    assert "Traceback" not in done.stderr

"""The doctor's benchmark: faults that last for one call, and a verdict that undisturbed findings do not bring about."""

import os
import subprocess
from pathlib import Path

import pytest

from tools.benchmarks.doctor import faults as module
from tools.benchmarks.doctor.faults import Fault, faults, found
from tools.benchmarks.doctor.table import as_markdown


@pytest.fixture
def no_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cannot_mount", lambda: "cannot mount: not permitted")


def by_name(gpus: int) -> dict[str, Fault]:
    return {fault.name: fault for fault in faults(gpus)}


def test_a_machine_skips_what_it_cannot_make(no_mounts: None) -> None:
    assert {fault.name for fault in faults(2) if fault.skipped} == {"little shared memory", "capped clock"}
    without_gpu = {fault.name for fault in faults(0) if fault.skipped}
    assert without_gpu - {"little shared memory", "capped clock"} == {
        "GPU memory held",
        "hidden GPU",
        "Triton cache not writable",
    }


def test_a_limit_stands_in_for_a_mount(no_mounts: None) -> None:
    assert by_name(0)["full disk"].made_by == "`ulimit -f 204800`"


def test_the_last_gpu_is_hidden() -> None:
    hidden = [by_name(gpus)["hidden GPU"] for gpus in (1, 4)]
    assert [(one.before, one.status) for one in hidden] == [
        ("export CUDA_VISIBLE_DEVICES=", "failure"),
        ("export CUDA_VISIBLE_DEVICES=0,1,2", "warning"),
    ]


def test_a_fault_ends_with_its_call(tmp_path: Path) -> None:
    def output(fault: Fault, shell: str) -> str:
        command = fault.command(["bash", "-c", shell])
        environment = os.environ | {"DOCTOR_DIRECTORY": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    known = by_name(1)
    assert output(known["few open files"], "ulimit -n") == "512"
    assert output(known["wrong network interface"], "echo $NCCL_SOCKET_IFNAME") == "absent0"
    for name, place, mebibytes in (("full disk", tmp_path, "64"), ("little shared memory", Path("/dev/shm"), "16")):
        if known[name].in_namespace and not known[name].skipped:
            before = os.statvfs(place).f_blocks
            assert output(known[name], f"df --output=size -m {place} | tail -1") == mebibytes
            assert os.statvfs(place).f_blocks == before


def test_only_a_new_finding_with_advice_counts() -> None:
    fault = Fault("full disk", "storage of *", "failure")

    def finding(**changes: str) -> dict[str, str]:
        return {"name": "storage of /a", "status": "failure", "advice": "Free space."} | changes

    assert found(fault, [finding()], [finding(status="ok")])
    assert not found(fault, [finding()], [finding()])
    for changes in ({"status": "warning"}, {"name": "free space"}, {"advice": ""}):
        assert not found(fault, [finding(**changes)], [])


def test_the_table_tells_what_was_missed_and_skipped() -> None:
    disk = {"name": "storage of /a", "status": "failure", "text": "No space\nleft", "advice": "Free space."}
    common = {"made_by": "`x`", "error": "", "seconds": 61.4}
    full = {"check": "storage of *", "status": "failure", "findings": [disk], "found": True}
    few = {"check": "open files", "status": "failure", "findings": [], "found": False}
    rows = [
        {"name": "undisturbed", "findings": [], "healthy": True, **common},
        {"name": "full disk", **full, **common},
        {"name": "few files", **few, **common},
        {"name": "capped clock", "skipped": "never made"},
    ]
    record = {"gpu": "G", "torch": "1", "triton": "2", "commit": "c", "command": "run", "gpus": 2, "rows": rows}
    text = as_markdown(record)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[1:] == [
        ["undisturbed", "`x`", "no failure", "none", "61"],
        ["full disk", "`x`", "failure storage of *", "yes", "61"],
        ["few files", "`x`", "failure open files", "NO", "61"],
        ["capped clock", "-", "-", "skipped", "-"],
    ]
    assert "- failure storage of /a: No space left. Remedy: Free space." in text
    assert "Skipped: capped clock: never made" in text

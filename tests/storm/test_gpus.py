"""The storm on GPUs, as far as it shows without one: commands, environments, and the output of nvidia-smi."""

import os

import pytest

from tests.storm.cluster import gpu_environment, start_command
from tests.storm.errors import StormError
from tests.storm.gpus import GpuMemory, parse_holders, parse_used
from tests.storm.storm import node_sizes


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a nvidia-smi on the path; provide a function that sets the output of both queries."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\ncase "$1" in *compute-apps*) cat {tmp_path}/apps;; *) cat {tmp_path}/used;; esac\n')
    script.chmod(0o755)

    def tell(apps: str, used: str) -> None:
        (tmp_path / "apps").write_text(apps)
        (tmp_path / "used").write_text(used)

    return tell


def test_a_node_sees_its_gpu_alone(tmp_path):
    command = start_command("127.0.0.1", tmp_path, cpus=1, gpu=1)
    assert {"--num-gpus=1", "--num-cpus=1"} <= set(command)
    assert gpu_environment(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert "--num-gpus=0" in start_command("127.0.0.1", tmp_path, cpus=2, gpu=None)
    assert gpu_environment(None) == {}


def test_each_gpu_has_a_node_and_there_is_no_spare():
    assert node_sizes(2, 2) == [(1, 0), (1, 1)]
    assert node_sizes(4, 0) == [(2, None)] * 3


def test_the_output_of_nvidia_smi_is_read():
    assert parse_holders("4711, 520 MiB\n4711, 3 MiB\n12, [N/A]\n\n") == {4711: 523, 12: 0}
    assert parse_holders("") == {}
    assert parse_used("3 MiB\n81000 MiB\n") == [3, 81000]


def test_a_process_that_is_not_the_runs_may_hold_no_memory(nvidia_smi):
    nvidia_smi("1, 300 MiB\n", "303 MiB\n0 MiB\n")
    memory = GpuMemory(2)
    nvidia_smi(f"1, 300 MiB\n{os.getpid()}, 512 MiB\n999999999, 600 MiB\n", "350 MiB\n0 MiB\n")
    memory.check_holders(lambda: [os.getpid()], seconds=0)
    with pytest.raises(StormError, match=f"{{{os.getpid()}: 512}}"):
        memory.check_holders(list, seconds=0)


def test_memory_that_no_process_shows_is_left_behind_too(nvidia_smi):
    nvidia_smi("", "3 MiB\n0 MiB\n")
    memory = GpuMemory(2)
    nvidia_smi("", "60 MiB\n0 MiB\n")
    memory.check_free(seconds=0)
    nvidia_smi("", "3 MiB\n500 MiB\n")
    with pytest.raises(StormError, match=r"\[3, 500\], and \[3, 0\] before"):
        memory.check_free(seconds=0)


def test_nothing_is_checked_without_gpus_or_without_nvidia_smi(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi("", "3 MiB\n")
    on_cpus = GpuMemory(0)
    nvidia_smi(f"{os.getpid()}, 512 MiB\n", "515 MiB\n")
    on_cpus.check_free(seconds=0)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    GpuMemory(2).check_free(seconds=0)

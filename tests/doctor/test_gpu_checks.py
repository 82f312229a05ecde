"""Checks of GPUs and their links, with the output that nvidia-smi would print, by a program of its name."""

import os
from types import SimpleNamespace

import pytest
import torch

from dash_dist.doctor import Site, Status
from dash_dist.doctor.checks import gpu, links
from tests.doctor.findings import failed


@pytest.fixture
def site(tmp_path):
    return Site(ranks=2, gpus=0, directory=tmp_path / "runs")


@pytest.fixture
def smi(tmp_path, monkeypatch):
    def write(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return write


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_gpus_that_pytorch_cannot_use(site, smi, no_cuda):
    smi('echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"')
    failed(gpu.devices(site), "Install a PyTorch build for CUDA")


def test_no_gpu_is_no_failure(site, smi, no_cuda):
    smi("exit 9")
    (finding,) = gpu.devices(site)
    assert (finding.status, finding.text) == (Status.SKIPPED, "no CUDA device")


def test_a_driver_that_is_too_old(smi):
    smi('echo "| NVIDIA-SMI 550.54  Driver Version: 550.54.14   CUDA Version: 12.4 |"')
    assert gpu._driver("12.8").status is Status.OK
    failed([gpu._driver("13.0")], "Update the driver")


def test_errors_that_the_driver_counted(tmp_path, smi, monkeypatch):
    site = Site(ranks=2, gpus=3, directory=tmp_path)
    monkeypatch.setattr(gpu, "_xid_messages", lambda: [])
    smi("printf '0, 0, No\\n1, 4, No\\n2, [N/A], [N/A]\\n'")
    assert failed(gpu.errors(site), "nvidia-smi --gpu-reset -i 1").name == "GPU 1 memory"
    smi("printf '0, 0, No\\n'")
    monkeypatch.setattr(gpu, "_xid_messages", lambda: ["NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off the bus."])
    assert "79, GPU has fallen" in failed(gpu.errors(site), "list of Xid errors", Status.WARNING).text


def test_gpus_that_are_hidden(smi, monkeypatch):
    smi("printf 'GPU 0: NVIDIA H200 (UUID: GPU-0)\\nGPU 1: NVIDIA H200 (UUID: GPU-1)\\n'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu._unused(2) == []
    finding = failed(gpu._unused(1), "Unset CUDA_VISIBLE_DEVICES", Status.WARNING)
    assert finding.text == "nvidia-smi lists 2, PyTorch can use 1: CUDA_VISIBLE_DEVICES=0"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    failed(gpu._unused(1), "dmesg | grep Xid")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert gpu._unused(1) == []
    monkeypatch.delenv("SLURM_JOB_ID")
    smi("printf 'GPU 0: NVIDIA H200 (UUID: GPU-0)\\n  MIG 1g.18gb Device 0: (UUID: MIG-0)\\nGPU 1: NVIDIA H200\\n'")
    assert gpu._unused(1) == []


def test_memory_that_another_process_holds(monkeypatch):
    device = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(gpu, "_wrong_product", lambda index: "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (139 * 2**30, 140 * 2**30))
    assert gpu._device(0).status is Status.OK
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (14 * 2**30, 140 * 2**30))
    assert "90% of its memory is in use" in failed([gpu._device(0)], "end it", Status.WARNING).text

    def full(index):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(gpu, "_wrong_product", full)
    assert "too little memory is free" in failed([gpu._device(0)], "end it").text


def test_a_gpu_that_computes_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**30, 2**30))
    monkeypatch.setattr(gpu, "_wrong_product", lambda index: "a product has 3 wrong entries")
    assert "3 wrong entries" in failed([gpu._device(0)], "have it replaced").text


def test_a_clock_that_is_capped():
    assert gpu._clock("GPU 0 clock", "1980, 1980\n").status is Status.OK
    capped = failed([gpu._clock("GPU 0 clock", "1200, 1980\n")], "nvidia-smi -rgc", Status.WARNING)
    assert (capped.text, capped.value, capped.unit) == ("1200 of at most 1980 MHz", 1200, "MHz")
    assert gpu._clock("GPU 0 clock", "[N/A], [N/A]\n").status is Status.SKIPPED


@pytest.mark.parametrize("words", ["CUDA out of memory.", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_full_memory_is_no_fault_of_the_clock(tmp_path, monkeypatch, words):
    def full(index):
        raise RuntimeError(words)

    monkeypatch.setattr(gpu, "_clocks_under_load", full)
    (finding,) = gpu.clocks(Site(ranks=2, gpus=1, directory=tmp_path))
    assert (finding.status, finding.name) == (Status.SKIPPED, "GPU 0 clock")


def test_a_triton_cache_that_cannot_be_used(tmp_path, monkeypatch):
    site = Site(ranks=2, gpus=1, directory=tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "Not a directory" in failed(gpu.triton_cache(site), "Set TRITON_CACHE_DIR").text
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert gpu.triton_cache(site)[0].status is Status.OK
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert "noexec" in failed(gpu.triton_cache(site), "Set TRITON_CACHE_DIR").text
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "file"))
    assert f"{tmp_path}/file/.triton/cache" in failed(gpu.triton_cache(site), "Set TRITON_CACHE_DIR").text
    assert gpu.triton_cache(Site(ranks=2, gpus=0, directory=tmp_path))[0].text == "no CUDA device"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("X NV18|NV18 X", ("18 NVLinks", 450.0)),
        ("X NV4 SYS|NV4 X PIX|SYS PIX X", ("PCIe (PIX)", 20.0)),
        ("X", None),
    ],
)
def test_the_slowest_link_of_a_topology(cells, expected):
    rows = cells.split("|")
    names = [f"GPU{index}" for index in range(len(rows))]
    lines = [f"{name} {row} SYS 0-15 0 N/A" for name, row in zip(names, rows, strict=True)]
    matrix = "\n".join([" " + " ".join(names) + " NIC0 CPU Affinity", *lines, "NIC0 SYS SYS X"])
    assert links.slowest_link(matrix) == expected


def test_a_slow_link_is_a_warning(monkeypatch):
    monkeypatch.setattr(links, "_slowest_link", lambda: ("18 NVLinks", 450.0))
    failed([links._bandwidth("all-to-all", "NCCL", 100.0, gpu=True)], "nvidia-smi topo -m", Status.WARNING)
    assert links._bandwidth("all-to-all", "NCCL", 300.0, gpu=True).status is Status.OK

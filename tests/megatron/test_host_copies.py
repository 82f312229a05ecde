"""Copies of tensors in memory that forked processes share."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dash_dist.checkpoints.background import ForkedCall
from dash_dist.errors import RankError
from dash_dist.megatron import host_copies, host_memory
from dash_dist.megatron.host_copies import HostCopies, is_written_by_gpu

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


def tensors_on(device: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(torch.seed())
    shapes = [(3, 5), (), (1,), (0, 4), (129, 7)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    made = [
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    return [*made, made[-1].t()]


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_equal_contiguous_and_stay_as_they_are(device):
    tensors = tensors_on(device)
    expected = [tensor.cpu().clone() for tensor in tensors]
    copies = HostCopies()
    found = copies.copy(tensors)
    for tensor in tensors:
        tensor.zero_()
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        assert one.device.type == "cpu"
        assert one.is_pinned() == (device == "cuda")
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_allocated_once_and_grows_when_it_must(device, monkeypatch):
    sizes: list[int] = []
    mapped = mmap.mmap

    def counted(number: int, size: int) -> mmap.mmap:
        sizes.append(size)
        return mapped(number, size)

    monkeypatch.setattr(host_copies.mmap, "mmap", counted)
    copies, tensors = HostCopies(), tensors_on(device)
    copies.prepare(tensors)
    copies.prepare(tensors)
    addresses = [[one.data_ptr() for one in copies.copy(tensors)] for _ in range(2)]
    assert addresses[0] == addresses[1]
    assert len(sizes) == 1
    more = [*tensors, torch.ones(5000, device=device)]
    assert torch.equal(copies.copy(more)[-1], torch.ones(5000))
    assert sizes[0] < sizes[1]
    assert torch.equal(copies.copy(tensors)[0], tensors[0].cpu())
    assert len(sizes) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_forked_process_reads_the_copies(device):
    tensors = tensors_on(device)
    copies = HostCopies().copy(tensors)
    total = ForkedCall(lambda: [one.double().sum().item() for one in copies]).result()
    assert total == [tensor.cpu().contiguous().double().sum().item() for tensor in tensors]


def test_too_little_memory_is_refused_when_the_copies_are_made(monkeypatch):
    available = 0
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: available)
    copies, tensors = HostCopies(), tensors_on("cpu")
    copies.prepare(tensors)  # training goes on
    with pytest.raises(RankError, match=r"in the background needs .* set checkpoint\.asynchronous to false"):
        copies.copy(tensors)
    available = 2**40  # something else has ended
    assert torch.equal(copies.copy(tensors)[0], tensors[0])


def test_what_another_rank_takes_meanwhile_is_seen(monkeypatch):
    available = iter([2**40, 0])
    monkeypatch.setattr(host_copies, "_PIECE", 512)
    monkeypatch.setattr(host_memory, "available_host_bytes", lambda: next(available, 0))
    copies = HostCopies()
    copies.prepare(tensors_on("cpu"))
    with pytest.raises(RankError, match="are available"):
        copies.copy(tensors_on("cpu"))


def on_gpu(size: int) -> Any:
    """A stand-in for a tensor, to allocate for."""
    return SimpleNamespace(nbytes=size, is_cuda=True, device=torch.device("cuda", 0))


def is_mapped(address: int) -> bool:
    areas = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in areas)


def test_memory_is_unlocked_before_it_is_given_back(monkeypatch):
    """Otherwise CUDA takes for locked whatever is mapped there next, and copies to pages that are no longer there."""
    locked: list[int] = []
    unlocked: list[tuple[int, bool]] = []

    def lock(memory: torch.Tensor, device: torch.device) -> int:
        locked.append(memory.data_ptr())
        return locked[-1]

    monkeypatch.setattr(host_copies, "_lock", lock)
    monkeypatch.setattr(host_copies, "_unlock", lambda address: unlocked.append((address, is_mapped(address))))
    copies = HostCopies()
    for size in (2**24, 2**25):
        copies.prepare([on_gpu(size)])
        copies._wait()
    assert unlocked == [(locked[0], True)]
    del copies
    assert unlocked == [(address, True) for address in locked]


def test_memory_that_cannot_be_locked_is_given_back(monkeypatch):
    tried: list[int] = []

    def lock(memory: torch.Tensor, device: torch.device) -> int:
        tried.append(memory.data_ptr())
        raise RankError("CUDA cannot page-lock")

    monkeypatch.setattr(host_copies, "_lock", lock)
    copies = HostCopies()
    copies.prepare([on_gpu(2**28)])
    copies._wait()
    assert not is_mapped(tried[0])
    with pytest.raises(RankError, match="cannot page-lock"):
        copies.copy([on_gpu(2**28)])


def test_only_what_a_gpu_writes_to_needs_a_copy():
    assert not is_written_by_gpu(torch.zeros(2))

"""Copies of tensors in memory that forked processes share."""

from __future__ import annotations

import mmap

import pytest
import torch

from dash_dist.checkpoints.background import ForkedCall
from dash_dist.errors import RankError
from dash_dist.megatron import host_copies
from dash_dist.megatron.host_copies import HostCopies, is_written_by_gpu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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
    monkeypatch.setattr(host_copies, "available_host_bytes", lambda: available)
    copies, tensors = HostCopies(), tensors_on("cpu")
    copies.prepare(tensors)  # training goes on
    with pytest.raises(RankError, match=r"in the background needs .* set checkpoint\.asynchronous to false"):
        copies.copy(tensors)
    available = 2**40  # something else has ended
    assert torch.equal(copies.copy(tensors)[0], tensors[0])


def test_only_what_a_gpu_writes_to_needs_a_copy():
    assert not is_written_by_gpu(torch.zeros(2))

"""The device of a rank, and the threads beside it."""

import pytest
import torch

from dash_dist.distributed.process_group import choose_device


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_operators_on_the_cpu_have_one_thread_beside_a_gpu(monkeypatch, gpus):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = choose_device()
    assert str(device) == ("cpu", "cuda:0", "cuda:1")[gpus]
    assert chosen == ([device] if gpus else [])
    assert torch.get_num_threads() == (1 if gpus else 2)

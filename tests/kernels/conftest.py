"""Every torch.empty is filled with NaN, so that an element nobody wrote cannot hide; one thread for tiny tensors."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_empty_tensors() -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads that share tensors this small spend ten times the work on waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

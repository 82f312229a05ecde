"""Every torch.empty is filled with NaN, so that an element nobody wrote cannot hide."""

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

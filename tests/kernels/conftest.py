"""Every torch.empty is filled with NaN, so that an element nobody wrote cannot hide; one thread for tiny tensors; and
the interpreter's slowest operation by numpy.
"""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import ReduceOps


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


@pytest.fixture(autouse=True, scope="session")
def _or_by_numpy() -> Iterator[None]:
    """The interpreter knows sums and maxima, and goes number by number for all else."""
    element_by_element = ReduceOps.generic_reduce

    def reduce(self: ReduceOps, values: Any) -> Any:
        if self.combine_fn is not tl.standard._or_combine:
            return element_by_element(self, values)
        (value,) = values
        data = np.bitwise_or.reduce(value.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, value.dtype)

    with mock.patch.object(ReduceOps, "generic_reduce", reduce):
        yield

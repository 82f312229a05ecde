"""Settings that must be in place before Triton is imported anywhere, and which tests share a worker."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

KERNELS = Path(__file__).parent / "kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where pytest-xdist runs several workers: tests that start processes, measure times or kill ranks get a worker to
    themselves, one after another; those of the kernels, which only compute, fill the others.
    """
    for item in items:
        if KERNELS not in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("processes"))

"""Settings that must be in place before Triton is imported anywhere, and which tests share a worker."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).parent
WITH_DEADLINES = {"doctor", "report", "training"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where pytest-xdist runs several workers: tests that start whole runs, kill ranks or open a browser share one, one
    after another; other files with processes stay on a worker each; those of the kernels go anywhere.
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in WITH_DEADLINES:
            item.add_marker(pytest.mark.xdist_group("runs"))
        elif folder != "kernels":
            item.add_marker(pytest.mark.xdist_group(item.path.name))

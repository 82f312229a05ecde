"""Settings that must be in place before Triton is imported anywhere, and the grouping of tests by worker."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).parent
WITH_DEADLINES = {"checkpoints", "doctor", "report", "training"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Assign tests to pytest-xdist workers. Long tests with deadlines share a worker: they start whole runs, kill ranks
    or open a browser. Kernel tests go anywhere. The others stay together by file, with the fixtures of their module.
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        long = any(item.get_closest_marker(mark) for mark in ("slow", "browser"))
        if long and folder in WITH_DEADLINES:
            item.add_marker(pytest.mark.xdist_group("runs"))
        elif folder != "kernels":
            item.add_marker(pytest.mark.xdist_group(item.path.name))

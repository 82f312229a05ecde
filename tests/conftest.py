"""Settings that must be in place before anything is imported, the cache of the session, and the grouping by worker."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Workers and the ranks that tests start inherit the controller's folder: one cache for all, none in the user's home.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dash-dist-cache-")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many workers as cores: with threads of their own they would wait for each other

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a pytest whose test ids pytest-xdist cannot mark: it would ignore the groups in silence."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError(
            f"pytest-xdist does not group tests with pytest {pytest.__version__}: see pyproject.toml"
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache of the session, at the controller."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)

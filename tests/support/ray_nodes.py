"""Fixtures of tests that start Ray clusters of several raylets on this machine."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.storm.processes import Family


@pytest.fixture(scope="module")
def short_folder():
    """A folder with a path short enough for Ray's sockets, which the usual ones are not."""
    folder = Path(tempfile.mkdtemp(prefix="cl"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def family():
    """Fail the module if its tests leave a process behind."""
    family = Family()
    with family:
        yield family
    assert not family.strays

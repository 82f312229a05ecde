"""Fixtures of tests that start Ray clusters of several raylets on this machine.

Knows folders and processes; does not know clusters.
"""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.storm.processes import Family
from tests.support.processes import start_servers


@pytest.fixture(scope="module")
def short_folder():
    """Provide a folder whose path is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="cl"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def family():
    """Fail the module if its tests leave a process behind."""
    start_servers()  # they stay
    family = Family()
    with family:
        yield family
    assert not family.strays

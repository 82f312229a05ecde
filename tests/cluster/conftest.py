"""Ray clusters of several raylets on this machine, for tests that use the storm's parts and the tiny runs."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "training")]


@pytest.fixture(scope="module")
def short_folder():
    """A folder with a path short enough for Ray's sockets, which the usual ones are not."""
    folder = Path(tempfile.mkdtemp(prefix="cl"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def family():
    """Every process that the module's tests leave behind is a failure."""
    from storm.processes import Family

    family = Family()
    with family:
        yield family
    assert not family.strays

"""Errors for packages that an extra would install."""

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dash_dist.errors import ConfigError
from dash_dist.extras import MODULES, require_extra

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("extra", MODULES)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, extra):
    require_extra(extra, "this command")
    monkeypatch.setitem(sys.modules, MODULES[extra][0], None)
    with pytest.raises(ConfigError, match=rf"this command needs {MODULES[extra][0]}, .* 'dash-dist\[{extra}\]'"):
        require_extra(extra, "this command")


def test_the_extras_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {name: {Requirement(text).name for text in extras[name]} for name in MODULES}
    assert packages == {name: set(modules) for name, modules in MODULES.items()}
    assert set(MODULES) == set(extras) - {"all", "docs", "dev"}

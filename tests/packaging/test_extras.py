"""Errors for packages that an extra would install."""

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dash_dist.config.upkeep import LoggingSection
from dash_dist.doctor import Site, Status
from dash_dist.doctor.checks.ray_cluster import ray_answers
from dash_dist.doctor.command import examine
from dash_dist.errors import ConfigError
from dash_dist.extras import MODULES, require_extra
from dash_dist.training.telemetry.recorder import require_heat_maps

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("extra", MODULES)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, extra):
    require_extra(extra, "this command")
    monkeypatch.setitem(sys.modules, MODULES[extra][0], None)
    with pytest.raises(ConfigError, match=rf"this command needs {MODULES[extra][0]}, .* 'dash-dist\[{extra}\]'"):
        require_extra(extra, "this command")


def test_another_remedy_than_the_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"'\.\[deepspeed\]'; or set engine=megatron$"):
        require_extra("deepspeed", "this run", instead="set engine=megatron")


@pytest.mark.parametrize("layers", [None, [0]])
def test_heat_maps_without_matplotlib_are_refused_with_the_setting_to_change(monkeypatch, layers):
    logging = LoggingSection.model_validate({"heat_map_layers": layers})
    require_heat_maps(logging)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ConfigError, match=r"needs matplotlib, .* 'dash-dist\[report\]'.*; or set logging.heat_map_layers=\[\]"
    ):
        require_heat_maps(logging)
    require_heat_maps(LoggingSection.model_validate({"heat_map_layers": []}))


def test_a_cluster_is_not_examined_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"doctor --address needs ray, .* 'dash-dist\[ray\]'"):
        examine(None, [], ranks=2, directory=None, address="http://127.0.0.1:1", json_file=None)


def test_the_doctor_skips_a_ray_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    (finding,) = ray_answers(Site(ranks=2, gpus=0, directory=tmp_path, address=None, config=None))
    assert finding.status is Status.SKIPPED
    assert "'dash-dist[ray]'" in finding.text


def test_the_extras_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {name: {Requirement(text).name for text in extras[name]} for name in MODULES}
    assert packages == {name: set(modules) for name, modules in MODULES.items()}
    assert set(MODULES) == set(extras) - {"all", "docs", "dev", "lm-eval"}

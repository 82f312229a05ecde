"""The engines benchmark: every case is a configuration with the same data, and the table compares with the first."""

from pathlib import Path

import pytest

from dash_dist.config.file import load_config, to_yaml
from dash_dist.planning.measurements import Measurement
from tools.benchmarks.engines.__main__ import _planned_gib, _saves
from tools.benchmarks.engines.cases import CASES, SAVES_EVERY, STEPS, Case, write
from tools.benchmarks.engines.table import as_markdown


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_configuration_of_the_same_steps(case: Case, tmp_path: Path) -> None:
    config, first = (load_config(write(one, "tiny", 1024, tmp_path)) for one in (case, CASES[0]))
    parallel = config.parallel
    ranks = parallel.tensor * parallel.context * parallel.pipeline
    assert ranks in (case.gpus, 1)
    assert config.training == first.training
    assert config.data == first.data
    assert (config.engine == "deepspeed") == case.name.startswith("DeepSpeed")
    assert (config.checkpoint.interval < STEPS) == case.saves


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_a_planned_peak(case: Case, tmp_path: Path) -> None:
    config = to_yaml(load_config(write(case, "1b", 32_768, tmp_path)))
    measured = Measurement(case.name, config, case.gpus, "NVIDIA H200", 1, 1.0, None, None, 0.05)
    planned = _planned_gib(measured, measured.gpu)
    assert planned is not None
    assert 5 < planned < 100
    assert _planned_gib(measured, "another GPU") is None


def test_a_save_is_compared_with_the_steps_before_it() -> None:
    seconds = {step: 1.0 for step in range(1, STEPS + 1)} | {1: 9.0, SAVES_EVERY + 1: 1.5}
    curves = {"perf/step_seconds": seconds, "time_max/save": {SAVES_EVERY: 0.0, SAVES_EVERY + 1: 0.25}}
    assert _saves(curves) == {
        "save_pause_seconds": 0.25,
        "step_seconds_before_save": 1.0,
        "step_seconds_while_saving": 1.5,
    }


def test_the_table_compares_losses_with_those_of_the_first_run() -> None:
    common = {"step_seconds": 0.5, "tokens_per_second_per_gpu": 1000.0, "allocated_gib": 3.0, "density": 0.1}
    rows = [
        {"name": "one GPU", "gpus": 1, "losses": [5.0, 4.0], "planned_gib": 2.9, **common},
        {"name": "TP 2", "gpus": 2, "losses": [5.0, 3.75], "planned_gib": None, **common}
        | {"save_pause_seconds": 0.25, "step_seconds_before_save": 1.0, "step_seconds_while_saving": 1.5},
    ]
    record = {"gpu": "G", "torch": "1", "triton": "2", "commit": "c", "command": "run", "shape": "1b", "tokens": 4096}
    text = as_markdown({**record, "rows": rows, "failed": {"PP 2": "out of memory"}})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[1] == ["one GPU", "1", "5.0000", "4.0000", "0.0000", "0.500", "1000", "3.0", "2.9"]
    assert cells[2] == ["TP 2", "2", "5.0000", "3.7500", "0.2500", "0.500", "1000", "3.0", "-"]
    assert cells[4] == ["TP 2", "0.250", "1.000", "1.500"]
    assert "Failed: PP 2: out of memory" in text

"""The benchmark on trained inputs: what it captures of a run, and its tables."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.runs import run_command
from tools.benchmarks.trained.table import as_markdown


@pytest.mark.slow
def test_every_layer_of_a_trained_model_is_described(tmp_path: Path) -> None:
    out = tmp_path / "trained.json"
    command = [sys.executable, "-m", "tools.benchmarks.trained", str(tmp_path), "--out", str(out), "--size", "cpu"]
    command += ["--tokens", "1024", "--heads", "4,2", "--heads", "2,2", "--megabytes", "0.2"]
    done = run_command(command, {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    models = json.loads(out.read_text())["models"]
    assert [(model["heads"], model["tokens"]) for model in models] == [([4, 2], 1024), ([2, 2], 1024)]
    for model in models:
        assert len(model["layers"]) == 2
        for layer in model["layers"]:
            assert layer["density"] > 0.9  # two steps teach no router to leave chunks out
            assert layer["chunks"]["0.99"] == 16
            assert 0 < max(layer["errors"].values()) < 0.05  # of bfloat16, against float64
            assert layer["summary_query_norm"] > 0  # it was zero before the first step
    assert "(2, 2) heads, T = 1024" in out.with_suffix(".md").read_text()


def test_speedups_are_those_over_cudnn() -> None:
    stages = {"route": 1.25, "attend": 0.5, "query gradient": 0.75, "key gradient": 1.5}
    layer = {"density": 0.0213, "chunks": {"0.5": 8.0, "0.99": 41.0}, "tile_efficiency": 0.5, "host": 0.75}
    layer |= {"errors": {"output": 2e-3, "summary_query": 3e-2}}
    layer |= {"forward": 2.0, "forward_backward": 5.0, "stages": stages}
    layer |= {"cudnn": {"forward": 8.0, "forward_backward": 30.0}}
    model = {"heads": [8, 2], "tokens": 32768, "loss": 1.5, "layers": [layer]}
    record = {"gpu": "G", "torch": "1", "triton": "2", "commit": "c", "command": "run", "models": [model]}
    row = as_markdown(record).strip().splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:4] == ["0", "0.0213", "8 / 41", "0.50"]
    assert cells[4:] == [
        "2.00",
        "4.00",
        "5.00",
        "6.00",
        "0.75",
        "1.25",
        "0.50",
        "0.75",
        "1.50",
        "3e-02 (summary_query)",
    ]

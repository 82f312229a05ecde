"""Predicted seconds of the steps that the step benchmark has measured on one H200, in all and by part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dash_dist.config.run import RunConfig
from dash_dist.planning import GPUS, Assumptions, Layout, Machine, predict
from tools.benchmarks.step.cases import CASES, VOCABULARY, settings

RESULTS = Path(__file__).parents[2] / "docs/results"
MULTIPLIED_AGAIN = "step_1xh200_e44018d"
"""That commit multiplied the MLP's second matrix again, which is left out since."""
ROWS = [
    (name, row)
    for name in ("step_1xh200", MULTIPLIED_AGAIN)
    for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]
]
PARTS = {
    "matmul": ("matrix products", "output layer: products"),
    "elementwise": (
        "norms",
        "MLP: activation",
        "rotary, copies of q, k, v",
        "residuals, casts, copies",
        "gradient accumulation",
        "embedding",
        "loss",
    ),
}


@pytest.mark.parametrize(("run", "row"), ROWS, ids=[f"{name}, {row['name']}" for name, row in ROWS])
def test_each_measured_step_is_predicted(run: str, row: dict[str, Any]) -> None:
    (case,) = (case for case in CASES if case.name == row["name"])
    config = RunConfig.model_validate(settings(case, row["tokens"], Path("unread")))
    gpu = GPUS["H200"]
    on = Machine(gpu, gpus=1, gpus_per_node=1, memory=gpu.memory * 2**30)
    assumed = replace(Assumptions(), density=row["density"])
    found = predict(config, Layout.of(config, 1), on, assumed, vocab_size=VOCABULARY)
    model = config.model
    again = (
        0.0
        if run != MULTIPLIED_AGAIN
        else 2.0 * row["tokens"] * model.num_layers * model.hidden_size * model.ffn_hidden_size
    )
    time = found.time + replace(type(found.time)(), matmul=again / (gpu.flops * assumed.matmul_efficiency))
    assert time.total == pytest.approx(row["step_seconds"], rel=0.05)
    attention = sum(seconds for title, seconds in row["parts"].items() if title.startswith("attention"))
    assert time.attention == pytest.approx(attention, rel=0.05)
    for name, titles in PARTS.items():
        assert getattr(time, name) == pytest.approx(sum(row["parts"][title] for title in titles), rel=0.08), name

"""Runs that train a part of the model: what they log, say and export."""

import json
from pathlib import Path

import pytest

from dash_dist.run.events import EventLog
from tests.support.attempts import Outcome
from tests.support.ranks import run_ranks
from tests.support.runs import read_curves, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    (found,) = run_ranks("tests.training.training_jobs:conversion_runs", 1, write_config(folder), folder, cpu_only=True)
    return found


@pytest.mark.slow
def test_a_conversion_phase_and_the_run_after_it(folder: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["phase"].summary.steps == 3
    distances = [event.value for event in read_curves(folder / "runs" / "phase").Scalars("routing/conversion_loss")]
    assert len(distances) == 3
    assert all(distance > 0 for distance in distances)
    assert outcomes["adapted"].summary.steps == 6
    scales = [event.value for event in read_curves(folder / "runs" / "adapted").Scalars("routing/scale")]
    assert scales == pytest.approx([8.0 ** (3 / 5), 8.0 ** (4 / 5), 8.0])  # of steps 4 to 6
    events = [event for event in EventLog(folder / "runs" / "adapted").read() if event.kind == "trainable_changed"]
    assert [(event.step, event.message) for event in events] == [
        (3, "28 trained parameters have no optimizer state in the checkpoint: it starts anew")
    ]


@pytest.mark.slow
def test_both_exports_of_the_run_with_adapters(folder: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["adapted"].summary.steps == 6
    assert {path.name for path in (folder / "merged").iterdir()} == {"config.json", "model.safetensors"}
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert settings["base_model_name_or_path"] is None
    assert (folder / "adapter" / "summary_query.safetensors").is_file()


@pytest.mark.slow
def test_weights_without_routing_get_advice_at_their_first_step(folder: Path, outcomes: dict[str, Outcome]) -> None:
    advice = f"{folder / 'dense'} was trained without routing"
    assert outcomes["from dense weights"].output.count(advice) == 1, outcomes["from dense weights"]
    for name, steps in {"from routed weights": 3, "resumed": 4}.items():
        assert outcomes[name].summary.steps == steps, outcomes[name]
        assert "without routing" not in outcomes[name].output
    assert f"model.weights: {folder / 'nothing'}" in outcomes["from missing weights"].error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("typo", "near misses are decoder.layers.*.self_attention.core_attention.attention.summary_query"),
        ("whole model in a phase", "attention.conversion trains summary_query alone"),
    ],
)
def test_runs_that_cannot_train_are_refused(outcomes: dict[str, Outcome], name: str, message: str) -> None:
    assert message in outcomes[name].error

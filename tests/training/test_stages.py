"""Runs with stages: the same as runs by hand, resumed anywhere, with gates and rollbacks at their boundaries."""

import re

import pytest
import yaml

from dash_dist.run.events import EventLog
from tests.support.ranks import run_ranks
from tests.support.runs import TINY, losses, read_curves, write_config

pytestmark = pytest.mark.slow

STAGES = [
    {"name": "short", "steps": 4},
    {
        "name": "long",
        "tokens": 4 * 1024 - 1,  # rounded up to 4 steps
        "training": {"sequence_length": 512},
        "model": {"positions": {"type": "linear", "factor": 2.0}},
        "parallel": {"context": 1, "tensor": 2},
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def staged(folder):
    training = {name: value for name, value in TINY["training"].items() if name != "steps"}
    config = {**TINY, "training": training, "stages": STAGES, "run": {"name": "x", "directory": str(folder / "runs")}}
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def gated(folder, staged):
    documents = folder / "heldout.txt"
    documents.write_text("held out " * 500)
    config = yaml.safe_load(staged.read_text())
    config["evaluation"] = {
        "interval": 100,
        "sequences": 2,
        "data": {"source": "files", "paths": str(documents)},
    }
    config["stages"][0]["gate"] = {"heldout_loss": 100.0}
    config["stages"][1]["gate"] = {"heldout_loss": 0.001}
    path = folder / "gated.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def outcomes(folder, staged, gated):
    plain = write_config(folder)
    # Here and not at the ranks, of which one would read what another is writing.
    (folder / "strict.yaml").write_text(gated.read_text().replace("100.0", "0.5"))
    config = yaml.safe_load(staged.read_text())
    config["stages"][1]["trainable"] = {"parameters": [{"match": "*.summary_qery"}]}
    (folder / "misspelt.yaml").write_text(yaml.safe_dump(config))
    first, _ = run_ranks(
        "tests.training.stage_jobs:runs_with_stages", 2, staged, plain, gated, folder, cpu_only=True, time_limit=280
    )
    return first


def test_stages_are_the_runs_that_one_would_start_by_hand(folder, outcomes):
    for name in ("whole", "short, by hand", "long, by hand"):
        assert outcomes[name].error == ""
    by_hand = losses(folder / "runs" / "hand_short") | losses(folder / "runs" / "hand_long")
    assert losses(folder / "runs" / "whole") == by_hand  # bit for bit
    assert list(by_hand) == list(range(1, 9))
    rates = {
        name: [event.value for event in read_curves(folder / "runs" / name).Scalars("train/learning_rate")]
        for name in ("whole", "hand_short", "hand_long")
    }
    assert rates["whole"] == rates["hand_short"] + rates["hand_long"]
    assert rates["whole"][4] == rates["whole"][0] == pytest.approx(5e-3)  # the second stage warms up again


def test_the_summary_is_of_the_whole_run(outcomes):
    summary = outcomes["whole"].summary
    assert (summary.steps, summary.completed) == (8, True)
    assert summary.tokens == 4 * 2 * 256 + 4 * 2 * 512
    assert summary.padding == 0
    assert "run whole, stage long: 2 x cpu over gloo: tp 2 x cp 1" in outcomes["whole"].output
    assert outcomes["whole"].output.count("finished, step 8") == 1
    assert "run whole is complete at step 8" in outcomes["again"].output


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_a_run_resumes_in_the_stage_where_it_stopped(folder, outcomes, steps):
    assert outcomes[f"stopped after {steps}"].summary.steps == steps
    assert not outcomes[f"stopped after {steps}"].summary.completed
    assert outcomes[f"continued after {steps}"].error == ""
    assert losses(folder / "runs" / f"stopped_{steps}") == losses(folder / "runs" / "whole")


def test_the_beginning_of_a_stage_is_an_event(folder, outcomes):
    for name in ("whole", "stopped_2", "stopped_6"):
        events = [event for event in EventLog(folder / "runs" / name).read() if event.kind == "stage"]
        assert [event.step for event in events] == [4]
        assert events[0].message == (
            "stage long begins: model.positions was the default and is {'type': 'linear', 'factor': 2.0}; "
            "training.sequence_length was 256 and is 512: continuing with the next unread token"
        )
    assert not [event for event in EventLog(folder / "runs" / "whole").read() if event.kind == "schedule_changed"]


def test_the_model_of_a_stage_is_gone_in_the_next(staged):
    assert run_ranks("tests.training.stage_jobs:models_that_stay", 2, staged, cpu_only=True) == [[[], [False]]] * 2


def test_a_gate_ends_the_run_and_keeps_its_checkpoint(folder, outcomes):
    message = (
        r"RunError: stage long ends at step 8 with a held-out loss of \d\.\d{4}, above its "
        r"gate\.heldout_loss = 0\.001; "
        r"the checkpoint is kept: give the stage more steps or change the limit"
    )
    assert re.match(message, outcomes["gate missed"].error)
    assert re.match(message, outcomes["gate still missed"].error)  # asked again, without training
    assert list(losses(folder / "runs" / "gated")) == list(range(1, 9))
    events = [event.message for event in EventLog(folder / "runs" / "gated").read() if event.kind == "stage"]
    assert events[0] == "stage short passes its gate"
    assert (folder / "runs" / "gated" / "checkpoints" / "step_00000008").is_dir()
    evaluated = [event.step for event in read_curves(folder / "runs" / "gated").Scalars("heldout/loss")]
    assert evaluated == [1, 4, 5, 8, 8]


def test_patterns_of_all_stages_are_checked_before_the_first_is_trained(folder, outcomes):
    message = r"ConfigError: the run cannot start: stage long: trainable\.parameters: \*\.summary_qery matches no "
    assert re.match(message, outcomes["misspelt"].error)
    assert not (folder / "runs" / "misspelt").exists()


def test_a_gate_between_stages_is_asked_again_by_another_attempt(folder, outcomes):
    for name in ("first gate missed", "first gate missed again"):
        assert "RunError: stage short ends at step 4 with a held-out loss of" in outcomes[name].error
    assert list(losses(folder / "runs" / "strict")) == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def rolled_back(staged):
    first, _ = run_ranks("tests.training.stage_jobs:rollbacks", 2, staged, cpu_only=True)
    return first


@pytest.mark.parametrize(("name", "to", "trained"), [("boundary", 4, [1, 2, 3, 4, 8]), ("beyond", 2, [1, 2, 7, 8])])
def test_a_rollback_may_end_in_the_stage_before(folder, rolled_back, name, to, trained):
    assert rolled_back[name].error == ""
    assert (rolled_back[name].summary.steps, rolled_back[name].summary.completed) == (8, True)
    run = folder / "runs" / name
    (event,) = [event for event in EventLog(run).read() if event.kind == "rollback"]
    assert f"back to {run / 'checkpoints' / f'step_{to:08d}'}" in event.message
    assert list(losses(run)) == trained  # the batches since the checkpoint are left out

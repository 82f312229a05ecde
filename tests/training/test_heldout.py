"""Runs with a held-out loss: its curves, and the training that it leaves alone."""

import re

import pytest

from tests.support.ranks import run_ranks
from tests.support.runs import losses, read_curves, write_config

pytestmark = pytest.mark.slow

BUCKETS = ["0-64", "64-128", "128-256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heldout")


@pytest.fixture(scope="module")
def outcomes(folder):
    documents = folder / "documents"
    documents.mkdir()
    for index in range(8):
        (documents / f"{index}.txt").write_text(f"The held-out document number {index}. " * (8 + 3 * index))
    evaluation = [
        "evaluation.interval=2",
        "evaluation.sequences=4",
        "evaluation.buckets=[64, 128]",
        "evaluation.data.source=files",
        f"evaluation.data.paths=[{documents}]",
    ]
    job = "tests.training.heldout_jobs:runs"
    return run_ranks(job, 2, write_config(folder), evaluation, cpu_only=True)


def heldout(folder, name):
    """Curve below heldout/ -> step -> value."""
    curves = read_curves(folder / "runs" / name)
    return {
        tag.removeprefix("heldout/"): {event.step: event.value for event in curves.Scalars(tag)}
        for tag in curves.Tags()["scalars"]
        if tag.startswith("heldout/")
    }


def test_the_losses_of_training_are_those_without_evaluation(folder, outcomes):
    assert not any(outcomes[0][name].error for name in ("without", "with", "dp", "separate"))
    assert len(losses(folder / "runs" / "without")) == 5
    assert losses(folder / "runs" / "with") == losses(folder / "runs" / "without")  # bit for bit


def test_the_curves_are_in_tensorboard_at_the_first_step_the_interval_and_the_last(folder, outcomes):
    curves = heldout(folder, "with")
    assert set(curves) == {"loss", "seconds", *(f"loss/{bucket}" for bucket in BUCKETS)}
    for curve in curves.values():
        assert list(curve) == [1, 2, 4, 5]
    assert heldout(folder, "without") == {}
    for step, loss in curves["loss"].items():
        means = [curves[f"loss/{bucket}"][step] for bucket in BUCKETS]
        assert loss == pytest.approx((64 * means[0] + 64 * means[1] + 128 * means[2]) / 256, rel=1e-5)
    assert curves["loss"][5] < curves["loss"][1]


def test_the_held_out_sequences_do_not_depend_on_the_layout(folder, outcomes):
    cp, dp = heldout(folder, "with"), heldout(folder, "dp")
    for name in cp.keys() - {"seconds"}:
        assert dp[name] == pytest.approx(cp[name], rel=1e-5)


def test_separate_documents_count_positions_of_their_own(folder, outcomes):
    assert heldout(folder, "separate").keys() == heldout(folder, "with").keys()
    assert heldout(folder, "separate")["loss"][1] != heldout(folder, "with")["loss"][1]


def test_the_console_shows_the_losses(outcomes):
    shown = re.findall(r"step (\d) +held-out loss \d\.\d{4} +by position: 0-64 \d\.\d{4}", outcomes[0]["with"].output)
    assert shown == ["1", "2", "4", "5"]
    assert "held-out" not in outcomes[0]["without"].output


def test_data_that_one_rank_cannot_read_ends_all_after_a_save(folder, outcomes):
    message = "cannot read the held-out data: Input/output error: /held/out"
    assert [outcome["unreadable"].error for outcome in outcomes] == [f"RunError: {message}"] * 2
    assert (folder / "runs" / "unreadable" / "checkpoints" / "step_00000002").is_dir()

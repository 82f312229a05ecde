"""The learning rate of every step, and the message about a change of its curve."""

import math

import pytest

from tests.support.ranks import run_ranks


def test_the_learning_rate_rises_falls_on_a_cosine_and_stays() -> None:
    schedule = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "decay_steps": 6}
    (found,) = run_ranks("tests.training.training_jobs:learning_rates", 1, schedule, 9, cpu_only=True)
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert found == pytest.approx([5e-3, *cosine, 1e-3, 1e-3, 1e-3])


def test_a_change_of_the_curve_is_described_with_the_way_back() -> None:
    (messages,) = run_ranks("tests.training.training_jobs:schedule_changes", 1, cpu_only=True)
    assert messages["same"] is None
    assert messages["unknown"] is None
    assert messages["longer"] == (
        "the learning rate of step 51 is 1.225e-03 instead of 2.000e-04: optimizer.decay_steps (by default "
        "training.steps) was 50 and is 100. To keep the checkpoint's curve, set optimizer.decay_steps=50"
    )
    assert messages["other rate"] == (
        "the learning rate of step 51 is 8.500e-04 instead of 2.000e-04: optimizer.lr was 0.002 and is 0.001; "
        "optimizer.warmup_steps was 10 and is 60; optimizer.decay_steps (by default training.steps) was 50 and is 100. "
        "To keep the checkpoint's curve, set optimizer.lr=0.002 optimizer.warmup_steps=10 optimizer.decay_steps=50"
    )

"""One rank trains a few steps with each engine and resumes: the part of test_engine.py that `make test` runs."""

import pytest

from tests.deepspeed_engine.deepspeed_cases import Run
from tests.support.ranks import run_ranks


def test_one_rank_trains_as_engine_megatron_does_and_resumes_exactly(tmp_path):
    runs = {"megatron": Run(None, steps=5, decay_steps=4), "deepspeed": Run(1, steps=5, decay_steps=4)}
    job, then = "tests.deepspeed_engine.deepspeed_jobs:one_after_another", [("save_and_go_on", Run(2))]
    ((trained, continued),) = run_ranks(job, 1, runs, then, tmp_path, cpu_only=True)
    expected, found = trained["megatron"], trained["deepspeed"]
    assert len(expected.losses) == 5
    for of_engine in (expected, found):
        assert of_engine.learning_rates == pytest.approx([5e-3, 1e-2, 5e-3, 0.0, 0.0], abs=1e-9)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert continued["rolled back"] == continued["undisturbed"]

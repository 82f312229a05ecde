"""The engine trains each step with its routing scale, and a resume continues with the scale of its step."""

from pathlib import Path

import pytest

from dash_dist.checkpoints.engine_state import read_engine_state
from tests.support.ranks import run_ranks

JOB = "tests.megatron.warmup_jobs:train"


@pytest.mark.slow
def test_scale_of_each_step_and_after_a_resume(tmp_path: Path) -> None:
    ((losses, scales, densities, _),) = run_ranks(JOB, 1, tmp_path / "saved", 6, None, cpu_only=True)
    factor = (16.0 / 0.5) ** 0.25
    assert scales == pytest.approx([0.5, 0.5 * factor, 0.5 * factor**2, 0.5 * factor**3, 16.0, 16.0])
    assert densities[0] == 1.0
    assert densities[5] < densities[2] < 1.0
    assert read_engine_state(tmp_path / "saved").function["attention.routing_scale"] == pytest.approx(scales[2])
    ((resumed, later, _, changes),) = run_ranks(JOB, 1, tmp_path / "none", 3, tmp_path / "saved", cpu_only=True)
    assert changes == []
    assert (resumed, later) == (losses[3:], scales[3:])

"""The planner's bytes of weights, gradients and optimizer state are those that DeepSpeed holds at each ZeRO stage."""

from pathlib import Path
from typing import get_args

import pytest

from dash_dist.config.deepspeed import ZeroSettings, ZeroStage
from dash_dist.planning.layouts import Layout
from dash_dist.planning.parameters import StageNumbers
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.sharding import Sharding
from tests.deepspeed_engine.deepspeed_cases import Run
from tests.support.models import MODEL, VOCAB_SIZE
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

WIDE = MODEL.model_copy(update={"hidden_size": 128, "ffn_hidden_size": 512})
BUCKETS = {
    "reduce_bucket_size": 20_000,
    "allgather_bucket_size": 20_000,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
"""None of the weights stays whole after it was used."""


def test_what_is_planned_is_held(tmp_path: Path) -> None:
    runs = {stage: Run(stage, bfloat16=True) for stage in get_args(ZeroStage)}
    job = "tests.deepspeed_engine.memory_jobs:held_before_updates"
    by_rank = run_ranks(job, 2, WIDE, runs, BUCKETS, tmp_path, cpu_only=True)
    layer = WIDE.hidden_size * (2 * WIDE.resolved_head_dim * (4 + 2) + 3 * WIDE.ffn_hidden_size)
    trained = WIDE.num_layers * layer + 2 * 64 * WIDE.hidden_size  # norms and summary queries are a thousandth
    assert VOCAB_SIZE <= 64
    for held in by_rank:
        for stage, found in zip(runs, held, strict=True):
            sharding = Sharding(optimizer=True, zero=ZeroSettings(stage=stage, **BUCKETS))
            state = sharding.state(
                StageNumbers(trained, trained), Layout(1, 1, 1, 2, "auto", Recompute()), largest_layer=0
            )
            bucket = 0 if stage == 3 else 4 * BUCKETS["reduce_bucket_size"]  # gone when the gradients are complete
            planned = state.weights + state.gradients + state.optimizer - bucket
            assert found == pytest.approx(planned, rel=0.02), stage

"""The loss on held-out sequences and next tokens with ZeRO: the other engine's, and without a trace in the training."""

import pytest

from tests.deepspeed_engine.deepspeed_cases import Run
from tests.support.models import Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

RUNS = {
    "reference": Run(None, Case(context=2)),
    "zero 1": Run(1, Case(context=2)),
    "zero 3, recompute": Run(3, Case(context=2, recompute="full")),
    "zero 3, dp 2": Run(3, Case()),
}


def test_losses_by_position_and_next_tokens_are_the_other_engines_and_training_goes_on_as_without(tmp_path):
    for rank in run_ranks("tests.deepspeed_engine.deepspeed_jobs:evaluations", 2, RUNS, tmp_path, cpu_only=True):
        for seen in rank.values():
            assert seen["with"] == seen["without"]  # bit for bit
            assert seen["next"] == rank["reference"]["next"]
            for bucket, expected in zip(seen["buckets"], rank["reference"]["buckets"], strict=True):
                assert bucket.tokens == expected.tokens
                assert bucket.total == pytest.approx(expected.total, rel=1e-5)

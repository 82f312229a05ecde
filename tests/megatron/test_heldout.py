"""The loss on held-out sequences by position: the same at every layout, and without a trace in the training."""

import pytest
import torch

from tests.support.models import Case, global_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

ALONE = {
    "whole": Case(micro_batch_size=4),
    "recompute": Case(recompute="full"),
    "logits in pieces": Case(logits_per_piece=2 * 64 * 24),
    "packed": Case(packed=True),
}
ON_TWO = {
    "tp 2": Case(tensor=2),
    "cp 2": Case(context=2),
    "cp 2, contiguous": Case(context=2, layout="contiguous"),
    "pp 2": Case(pipeline=2),
    "dp 2": Case(),
    "packed, cp 2": Case(packed=True, context=2),
    "packed, pp 2": Case(packed=True, pipeline=2),
    "packed, dp 2": Case(packed=True),
}
ON_FOUR = {"tp 2, cp 2": Case(tensor=2, context=2), "cp 2, pp 2": Case(context=2, pipeline=2)}
TRAINED_ALONE = {
    "alone": Case(distributed_optimizer=True),
    "recompute": Case(recompute="full"),
    "selective": Case(recompute="selective"),
}
TRAINED_ON_TWO = {
    "cp 2, recompute": Case(context=2, recompute="full", distributed_optimizer=True),
    "pp 2": Case(pipeline=2, grad_clip=0.5),
}


@pytest.fixture(scope="module")
def evaluated():
    """Case -> the losses by position at each rank."""
    by_case = {}
    for world_size, cases in ((1, ALONE), (2, ON_TWO), (4, ON_FOUR)):
        by_rank = run_ranks("tests.megatron.heldout_jobs:evaluations", world_size, cases, cpu_only=True)
        by_case |= {name: [rank[name] for rank in by_rank] for name in cases}
    (by_case["logits"],) = run_ranks("tests.megatron.heldout_jobs:from_logits", 1, cpu_only=True)
    return by_case


@pytest.mark.parametrize("name", [*ALONE, *ON_TWO, *ON_FOUR])
def test_losses_by_position_are_those_of_the_logits_at_every_layout(evaluated, name):
    expected = evaluated["logits"]["packed" if "packed" in name else "whole"]
    for buckets in evaluated[name]:
        assert [bucket.tokens for bucket in buckets] == [tokens for _, tokens in expected]
        assert [bucket.total for bucket in buckets] == pytest.approx([total for total, _ in expected], rel=1e-5)


def test_every_token_that_counts_is_in_one_bucket(evaluated):
    (buckets,) = evaluated["whole"]
    assert sum(bucket.tokens for bucket in buckets) == int(global_batch(0).loss_mask.sum())
    assert all(bucket.tokens for bucket in buckets)


@pytest.mark.parametrize(("world_size", "cases"), [(1, TRAINED_ALONE), (2, TRAINED_ON_TWO)])
def test_training_with_evaluations_is_training_without_bit_for_bit(world_size, cases):
    for rank in run_ranks("tests.megatron.heldout_jobs:trainings", world_size, cases, cpu_only=True):
        for without, with_evaluations in rank.values():
            assert with_evaluations["steps"] == without["steps"]
            assert with_evaluations["density"] == without["density"]
            assert torch.equal(with_evaluations["random"], without["random"])
            for weight, expected in zip(with_evaluations["weights"], without["weights"], strict=True):
                assert torch.equal(weight, expected)

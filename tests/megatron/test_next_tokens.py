"""The likeliest next tokens: those of the logits, at every layout, and without a trace in the training."""

import pytest
import torch

from tests.support.models import ROUTING_SCALE, Case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

JOBS = "tests.megatron.next_token_jobs"
ALONE = {"alone": Case(), "recompute": Case(recompute="full")}
ON_TWO = {
    "tp 2": Case(tensor=2),
    "cp 2": Case(context=2),
    "cp 2, contiguous": Case(context=2, layout="contiguous"),
    "pp 2": Case(pipeline=2),
    "dp 2": Case(),
}
ON_FOUR = {"tp 2, cp 2": Case(tensor=2, context=2), "cp 2, pp 2": Case(context=2, pipeline=2)}


@pytest.fixture(scope="module")
def expected():
    return run_ranks(f"{JOBS}:from_logits", 1, cpu_only=True)[0]


@pytest.mark.parametrize(("world_size", "cases"), [(1, ALONE), (2, ON_TWO), (4, ON_FOUR)])
def test_next_tokens_are_those_of_the_logits_at_every_layout(expected, world_size, cases):
    assert len(expected.unique()) > 5
    for rank in run_ranks(f"{JOBS}:next_tokens", world_size, cases, cpu_only=True):
        for name, (tokens, density) in rank.items():
            assert torch.equal(tokens, expected), name
            assert len(density) == 2
            assert all(0.1 < one < 0.95 for one in density)


def test_a_mistake_at_one_rank_is_an_error_at_every_rank():
    first, second = run_ranks(f"{JOBS}:bad_calls", 2, cpu_only=True)
    assert first.keys() == second.keys()
    assert "from 1 to 128 were asked for in rows of 128 tokens: give positions from 0 to 127" in first["beyond"]
    assert "257 positions were asked for in a row: ask for at most 256" in first["many"]
    assert "N and P above 0" in first["none"]
    assert "ranks [1] were given malformed" in first["short"]
    assert "[1, 100], expected [1, 128]" in second["short"]
    for name in ("other rows", "foreign tokens"):
        assert first[name].startswith("BatchError")
    assert first["after"] == second["after"] == "torch.Size([3, 5])"


def test_training_with_predictions_is_training_without():
    ((without, with_predictions),) = run_ranks(f"{JOBS}:trainings", 1, cpu_only=True)
    assert with_predictions == without  # bit for bit


def test_a_predictor_loads_the_weights_alone_at_any_layout(tmp_path):
    (expected,) = run_ranks(f"{JOBS}:save", 1, tmp_path / "saved", cpu_only=True)
    cases = {"tp 2": Case(tensor=2), "cp 2": Case(context=2), "pp 2": Case(pipeline=2)}
    for rank in run_ranks(f"{JOBS}:predict", 2, tmp_path / "saved", cases, ROUTING_SCALE, cpu_only=True):
        for name, (tokens, changes) in rank.items():
            assert torch.equal(tokens, expected), name
            assert changes == ["attention.routing_scale was 8.0 and is 1.0"]
    (other,) = run_ranks(f"{JOBS}:predict", 1, tmp_path / "saved", {"alone": Case()}, 1000.0, cpu_only=True)
    assert not torch.equal(other["alone"][0], expected)  # the routing scale counts

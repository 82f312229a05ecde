"""ZeRO freezes and trains the parameters that Megatron-core's optimizer does, and resumes with others."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.deepspeed_engine.deepspeed_cases import Run
from tests.support.models import Case
from tests.support.ranks import run_ranks

QUERY = ({"match": "*summary_query", "lr": 4e-2},)
MIXED = (*QUERY, {"match": "decoder.layers.1.mlp.*"})
LORA = {"rank": 4, "lr": 2e-2}
RECOMPUTE = Case(context=2, recompute="full")
RUNS = {
    "megatron": Run(None, Case(context=2), steps=4, trainable=MIXED),
    "all": Run(None, Case(context=2), steps=1),
    **{f"zero {stage}": Run(stage, Case(context=2), steps=4, trainable=MIXED) for stage in (1, 2, 3)},
    "zero 3, recompute": Run(3, RECOMPUTE, steps=4, trainable=MIXED),
    "zero 3, selective": Run(3, dataclasses.replace(RECOMPUTE, recompute="selective"), steps=4, trainable=MIXED),
    "megatron, lora": Run(None, Case(context=2), steps=3, lora=LORA),
    **{f"zero {stage}, lora": Run(stage, Case(context=2), steps=3, lora=LORA) for stage in (1, 3)},
    "zero 1, bfloat16": Run(1, Case(context=2), steps=2, bfloat16=True, trainable=MIXED),
}
CHANGES = [
    (Run(1, trainable=QUERY), Run(3, trainable=QUERY), Run(2, trainable=MIXED)),
    (Run(3, trainable=QUERY), Run(2, trainable=QUERY), Run(3, trainable=MIXED)),
    (Run(1, trainable=QUERY), Run(1, trainable=QUERY), Run(3, lora=LORA)),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Per rank: what every run of RUNS saw, then each of CHANGES."""
    folder = tmp_path_factory.mktemp("zero")
    jobs = [("change_parameters", runs) for runs in CHANGES]
    by_rank = []
    for number, then in enumerate(jobs):
        place = folder / str(number)
        place.mkdir()
        runs = RUNS if number == 0 else {}
        job = "tests.deepspeed_engine.deepspeed_jobs:one_after_another"
        by_rank.append(run_ranks(job, 2, runs, [then], place, cpu_only=True))
    return [[first[0], first[1], second[1], third[1]] for first, second, third in zip(*by_rank, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["zero 1", "zero 2", "zero 3", "zero 3, recompute", "zero 3, selective", "zero 1, lora", "zero 3, lora"]
)
def test_zero_trains_to_the_weights_of_megatron(results: list[list[Any]], name: str) -> None:
    for rank in results:
        expected, found = rank[0]["megatron, lora" if "lora" in name else "megatron"], rank[0][name]
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert found.learning_rates == pytest.approx(expected.learning_rates)
        for parameter, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[parameter], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_weights_train_too(results: list[list[Any]]) -> None:
    for rank in results:
        found, everything = rank[0]["zero 1, bfloat16"], rank[0]["all"]
        assert any(weight.any() for name, weight in found.weights.items() if name.endswith("summary_query"))
        assert found.losses == pytest.approx(rank[0]["megatron"].losses[:2], rel=2e-2)
        assert everything.losses[0] == pytest.approx(rank[0]["megatron"].losses[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "fresh"), [(1, 2), (2, 2), (3, 28)], ids=["zero 1 to 3 and 2", "zero 3 to 2 and 3", "adapters"]
)
def test_a_resume_keeps_the_state_of_parameters_in_both(results: list[list[Any]], change: int, fresh: int) -> None:
    some_moments: dict[str, bool] = {}
    for rank in results:
        found = rank[change]
        assert found["said"] == []
        assert found["resumed"].losses == pytest.approx(found["undisturbed"].losses, rel=1e-6)
        for name, weight in found["undisturbed"].weights.items():
            torch.testing.assert_close(found["resumed"].weights[name], weight, rtol=1e-6, atol=1e-7)
        assert found["changed"].losses[0] == pytest.approx(found["undisturbed"].losses[0], rel=1e-6)
        (said,) = found["changes"]
        assert said.startswith(f"{fresh} trained parameters have no optimizer state in the checkpoint")
        for name, has in found["moments"].items():
            some_moments[name] = some_moments.get(name, False) or has
    assert {name for name, has in some_moments.items() if has} == {n for n in some_moments if "summary_query" in n}
    assert len(some_moments) == 2 + fresh

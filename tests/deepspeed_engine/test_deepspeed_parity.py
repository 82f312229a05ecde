"""`engine: deepspeed` trains to what `engine: megatron` trains to, at every ZeRO stage."""

from pathlib import Path

import pytest
import torch
from deepspeed_cases import Run, Trained
from megatron_cases import Case
from ranks import run_ranks

TWO = Case(context=2, micro_batch_size=2)
REFERENCES = {
    "plain": Run(None, Case(micro_batch_size=4)),
    "packed": Run(None, Case(packed=True)),
    "tied": Run(None, Case(tie_embeddings=True)),
}
ALONE = {
    "plain, zero 1": Run(1),
}
ON_TWO = {
    "plain, zero 1, cp 2": Run(1, TWO),
    "plain, zero 2, dp 2": Run(2),
    "plain, zero 3, cp 2, recompute": Run(3, Case(context=2, micro_batch_size=2, recompute="full")),
    "plain, zero 2, cp 2, recompute": Run(2, Case(context=2, recompute="full")),
    "packed, zero 1, dp 2": Run(1, Case(packed=True)),
    "packed, zero 3, cp 2": Run(3, Case(packed=True, context=2)),
    "tied, zero 3, dp 2": Run(3, Case(tie_embeddings=True)),
}
ON_FOUR = {
    "plain, zero 1, cp 2, dp 2": Run(1, TWO),
    "plain, zero 3, cp 2, dp 2": Run(3, TWO),
    "packed, zero 2, cp 2, dp 2, recompute": Run(2, Case(packed=True, context=2, recompute="full")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, list[Trained]]:
    """Run -> what each rank saw."""
    folder = tmp_path_factory.mktemp("deepspeed")
    by_run: dict[str, list[Trained]] = {}
    for world_size, runs in ((1, REFERENCES | ALONE), (2, ON_TWO), (4, ON_FOUR)):
        by_rank = run_ranks("deepspeed_jobs:train", world_size, runs, folder, cpu_only=True)
        by_run |= {name: [rank[name] for rank in by_rank] for name in runs}
    return by_run


@pytest.mark.parametrize("name", [*ALONE, *ON_TWO, *ON_FOUR])
def test_the_run_is_that_of_engine_megatron(trained, name):
    (expected,) = trained[name.split(",")[0]]
    for rank in trained[name]:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-5)
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
        assert rank.learning_rates == expected.learning_rates
        assert rank.density == pytest.approx(expected.density, rel=1e-3)
        for key, weight in expected.weights.items():
            torch.testing.assert_close(rank.weights[key], weight, rtol=1e-3, atol=2e-4, msg=lambda m: f"{key}: {m}")
    assert expected.losses[-1] < expected.losses[0]

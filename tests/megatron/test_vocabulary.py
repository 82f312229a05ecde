"""The rows that pad the vocabulary have no part in the loss, at every tensor-parallel size."""

import dataclasses
import math

import pytest
import torch

from tests.megatron.test_layouts import assert_same, joined
from tests.support.models import Case, Measured
from tests.support.ranks import run_ranks

# 64 rows. Over four ranks the last holds 2 tokens of 50, and none of 40.
UNTIED = Case()
IN_PIECES = dataclasses.replace(UNTIED, logits_per_piece=2 * 16 * 24)
TIED = dataclasses.replace(UNTIED, tie_embeddings=True)
CASES = {
    f"{kind}, {vocab_size} tokens": (case, vocab_size)
    for kind, case in {"untied": UNTIED, "in pieces": IN_PIECES, "tied": TIED}.items()
    for vocab_size in (40, 50)
}
PADDED = ("output_layer.weight", "embedding.word_embeddings.weight")


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, Measured]]]:
    """Tensor-parallel size -> results of each rank."""

    def cases(tensor: int) -> dict[str, tuple[Case, int]]:
        return {name: (dataclasses.replace(case, tensor=tensor), size) for name, (case, size) in CASES.items()}

    return {
        tensor: run_ranks("tests.megatron.vocabulary_jobs:steps", tensor, cases(tensor), cpu_only=True)
        for tensor in (1, 2, 4)
    }


@pytest.fixture(scope="module")
def expected(measured: dict[int, list[dict[str, Measured]]]) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """(loss, gradients) in float64 of the models without padding."""
    models = {
        name: (case, size, without_padding(joined([measured[1][0][name]], "weights"), size))
        for name, (case, size) in CASES.items()
    }
    (expected,) = run_ranks("tests.megatron.vocabulary_jobs:unpadded_in_float64", 1, models, cpu_only=True)
    return expected


def without_padding(tensors: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    return {name: tensor[:vocab_size] if name in PADDED else tensor for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_model_without_padding(
    measured: dict[int, list[dict[str, Measured]]],
    expected: dict[str, tuple[float, dict[str, torch.Tensor]]],
    name: str,
    tensor: int,
) -> None:
    ranks = [rank[name] for rank in measured[tensor]]
    loss, gradients = expected[name]
    for rank in ranks:
        assert rank.losses == pytest.approx([loss], rel=1e-6)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert rank.grad_norm == pytest.approx(norm, rel=1e-5)
    full = joined(ranks, "gradients")
    _, vocab_size = CASES[name]
    assert_same(without_padding(full, vocab_size), gradients, relative=1e-5)
    for key in full.keys() & PADDED:
        assert full[key].shape[0] == 64
        assert not full[key][vocab_size:].any(), key


def test_the_weights_of_the_padding_never_matter() -> None:
    ((drawn, large),) = run_ranks(
        "tests.megatron.vocabulary_jobs:loss_with_other_padding", 1, UNTIED, 50, cpu_only=True
    )
    assert drawn == large

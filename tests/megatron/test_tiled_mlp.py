"""The tiled MLP gives the step of the whole one, runs each MLP twice and keeps none of its tensors."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.megatron.test_layouts import assert_same, joined, measured_steps
from tests.support.models import MODEL, SEQUENCE_LENGTH, SEQUENCES, Case, Measured
from tests.support.ranks import run_ranks

TILE = 24  # does not divide the sequence
REFERENCE = Case(micro_batch_size=SEQUENCES)
OLMO = dataclasses.replace(REFERENCE, family="olmo2")
ALONE = {
    "llama": REFERENCE,
    "olmo2": OLMO,
    "llama, tiled": Case(micro_batch_size=1, mlp_tile_tokens=TILE),
    "llama, tiled, recompute": Case(mlp_tile_tokens=TILE, recompute="full"),
    "llama, tiled over a batch": Case(mlp_tile_tokens=TILE),
    "llama, a tile of less than a row": Case(micro_batch_size=4, mlp_tile_tokens=1, recompute="full"),
    "olmo2, tiled": dataclasses.replace(OLMO, mlp_tile_tokens=TILE),
    "olmo2, tiled, recompute": dataclasses.replace(OLMO, mlp_tile_tokens=TILE, recompute="full"),
}
ON_TWO = {
    "llama, cp 2": Case(context=2, mlp_tile_tokens=TILE, recompute="full"),
    "llama, tp 2": Case(tensor=2, mlp_tile_tokens=TILE),
    "llama, tp 2, recompute": Case(tensor=2, mlp_tile_tokens=TILE, recompute="full"),
    "llama, pp 2, recompute": Case(pipeline=2, mlp_tile_tokens=TILE, recompute="full"),
    "llama, dp 2": Case(mlp_tile_tokens=TILE),
}
ON_FOUR = {
    "olmo2, tp 2, cp 2, recompute": Case(family="olmo2", tensor=2, context=2, mlp_tile_tokens=TILE, recompute="full"),
    "llama, cp 2, pp 2, recompute": Case(context=2, pipeline=2, mlp_tile_tokens=TILE, recompute="full"),
}
FROZEN = {"parameters": [{"match": "*.mlp.linear_fc2.weight"}, {"match": "*layernorm.weight"}]}
LORA = {"lora": {"rank": 4}}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Measured]]:
    """Case name -> what each rank measured."""
    return measured_steps({1: ALONE, 2: ON_TWO, 4: ON_FOUR})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list(ALONE)[2:], *ON_TWO, *ON_FOUR])
def test_step_equals_that_of_the_whole_mlp(measured: dict[str, list[Measured]], name: str) -> None:
    reference = measured[name.split(",")[0]]
    for rank in measured[name]:
        assert rank.losses == pytest.approx(reference[0].losses, rel=1e-6)
        assert rank.grad_norm == pytest.approx(reference[0].grad_norm, rel=1e-5)
    assert_same(joined(measured[name], "gradients"), joined(reference, "gradients"), relative=1e-5)
    assert_same(joined(measured[name], "weights"), joined(reference, "weights"), relative=1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_mlp_runs_twice_and_hands_its_gradients_on_once_a_micro_batch(recompute: Any) -> None:
    ((tokens, handed_on),) = run_ranks(
        "tests.megatron.tiled_mlp_jobs:mlp_calls", 1, Case(recompute=recompute, mlp_tile_tokens=TILE), cpu_only=True
    )
    assert max(tokens) == TILE
    assert sum(tokens) == 2 * SEQUENCES * SEQUENCE_LENGTH
    assert handed_on == SEQUENCES // Case().micro_batch_size


def test_nothing_of_the_mlp_is_kept() -> None:
    whole, tiled = (
        run_ranks("tests.megatron.tiled_mlp_jobs:kept_bytes", 1, Case(mlp_tile_tokens=tile), cpu_only=True)[0]
        for tile in (None, TILE)
    )
    of_mlp = 3 * MODEL.ffn_hidden_size + 2 * MODEL.hidden_size  # SwiGLU's, and the unfused norm's input and output
    assert whole - tiled >= 4 * MODEL.num_layers * SEQUENCE_LENGTH * of_mlp


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("trainable", [FROZEN, LORA], ids=["frozen", "lora"])
def test_frozen_weights_and_adapters(trainable: dict[str, Any], tensor: int, recompute: Any) -> None:
    whole, tiled = (
        run_ranks(
            "tests.megatron.tiled_mlp_jobs:gradients_of",
            tensor,
            Case(tensor=tensor, recompute=recompute, mlp_tile_tokens=tile),
            trainable,
            cpu_only=True,
        )
        for tile in (None, TILE)
    )
    for expected, found in zip(whole, tiled, strict=True):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 1e-6, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)

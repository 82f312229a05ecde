"""Layers that select a fixed number of chunks give the same step at every parallel layout."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dash_dist.checkpoints.export import export_weights
from dash_dist.config.selection import InfLLMv2Config
from tests.megatron.test_layouts import assert_same, joined, measured_steps
from tests.support.models import CHUNK_SIZE, SEQUENCE_LENGTH, SEQUENCES, Case, Measured
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

TOP_CHUNKS = 3
TOPK = Case(kind=("dash", "topk"), top_chunks=TOP_CHUNKS)
INFLLM = dataclasses.replace(
    TOPK, kind=("dash", "infllmv2"), infllmv2=InfLLMv2Config(first_chunks=1, local_chunks=0, dense_length=32)
)
PACKED = dataclasses.replace(TOPK, packed=True)
PACKED_INFLLM = dataclasses.replace(INFLLM, packed=True)
ALONE = {
    "topk": dataclasses.replace(TOPK, micro_batch_size=SEQUENCES),
    "infllmv2": dataclasses.replace(INFLLM, micro_batch_size=SEQUENCES),
    "packed": PACKED,
    "packed infllmv2": PACKED_INFLLM,
    "topk, recompute": dataclasses.replace(TOPK, recompute="full"),
}
ON_TWO = {
    "topk, cp 2": dataclasses.replace(TOPK, context=2),
    "topk, cp 2, recompute": dataclasses.replace(TOPK, context=2, recompute="full"),
    "topk, tp 2": dataclasses.replace(TOPK, tensor=2),
    "topk, pp 2": dataclasses.replace(TOPK, pipeline=2),
    "infllmv2, cp 2, recompute": dataclasses.replace(INFLLM, context=2, recompute="full"),
    "infllmv2, tp 2": dataclasses.replace(INFLLM, tensor=2),
    "packed, cp 2, recompute": dataclasses.replace(PACKED, context=2, recompute="full"),
    "packed infllmv2, cp 2": dataclasses.replace(PACKED_INFLLM, context=2),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Measured]]:
    """Case name -> what each rank measured."""
    return measured_steps({1: ALONE, 2: ON_TWO})


@pytest.mark.parametrize("name", [*list(ALONE)[4:], *ON_TWO])
def test_step_equals_one_process(measured: dict[str, list[Measured]], name: str) -> None:
    reference = measured[name.split(",")[0]]
    for rank in measured[name]:
        assert rank.losses == pytest.approx(reference[0].losses, rel=1e-6)
        assert rank.grad_norm == pytest.approx(reference[0].grad_norm, rel=1e-5)
    found, wanted = joined(measured[name], "gradients"), joined(reference, "gradients")
    without = [weight for weight, gradient in wanted.items() if not gradient.any()]
    assert len(without) == 1  # no gradient reaches the summary_query of the layer that takes the top chunks
    assert "layers.1" in without[0]
    assert not found.pop(without[0]).any()
    del wanted[without[0]]
    assert_same(found, wanted, relative=1e-5)


def density_of(top_chunks: int) -> float:
    """Density of a sequence of the tests whose tokens select as many chunks, or all there are."""
    chunks = SEQUENCE_LENGTH // CHUNK_SIZE
    return float(torch.arange(1, chunks + 1).clamp(max=top_chunks).sum() / (chunks * (chunks + 1) / 2))


@pytest.mark.parametrize("name", [*ALONE, *ON_TWO])
def test_both_layers_have_statistics(measured: dict[str, list[Measured]], name: str) -> None:
    for rank in measured[name]:
        assert len(rank.density) == len(rank.selected) == len(rank.maps) == 2
        if not name.startswith("packed"):
            selected = density_of(TOP_CHUNKS)
            assert rank.density[1] == pytest.approx(selected)


def test_transformers_has_no_such_layers(tmp_path: Path) -> None:
    run_ranks("tests.megatron.megatron_jobs:train_and_save", 1, {"topk": TOPK}, tmp_path, cpu_only=True)
    with pytest.raises(ValueError, match="layers of kind topk are computed in training and by `dash-dist evaluate`"):
        export_weights(tmp_path / "topk", tmp_path / "out")
    assert not (tmp_path / "out").exists()

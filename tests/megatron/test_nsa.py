"""Layers of Native Sparse Attention give the same step at every layout, and the same run after a checkpoint."""

import dataclasses
from pathlib import Path

import pytest

from dash_dist.checkpoints.export import export_weights
from dash_dist.config.attention import AttentionConfig
from dash_dist.config.selection import NSAConfig
from dash_dist.models.nsa import nsa_parameters
from tests.megatron.test_fixed_kinds import density_of
from tests.megatron.test_layouts import assert_same, joined, measured_steps
from tests.support.models import (
    CHUNK_SIZE,
    MODEL,
    SEQUENCES,
    STEPS_BEFORE_SAVE,
    Case,
    Measured,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

TOP_CHUNKS = 4
NSA = Case(kind=("dash", "nsa"), top_chunks=TOP_CHUNKS, nsa=NSAConfig(window=24))
PACKED = dataclasses.replace(NSA, packed=True)
ALONE = {
    "nsa": dataclasses.replace(NSA, micro_batch_size=SEQUENCES),
    "packed": PACKED,
    "nsa, recompute": dataclasses.replace(NSA, recompute="full"),
    "nsa, recompute projections": dataclasses.replace(NSA, recompute="selective", recompute_modules=("projections",)),
}
ON_TWO = {
    "nsa, cp 2": dataclasses.replace(NSA, context=2),
    "nsa, cp 2, contiguous, ring": dataclasses.replace(NSA, context=2, layout="contiguous", exchange="ring"),
    "nsa, cp 2, recompute": dataclasses.replace(NSA, context=2, recompute="full"),
    "nsa, tp 2": dataclasses.replace(NSA, tensor=2),
    "nsa, pp 2": dataclasses.replace(NSA, pipeline=2),
    "packed, cp 2, recompute projections": dataclasses.replace(
        PACKED, context=2, recompute="selective", recompute_modules=("projections",)
    ),
    "packed, tp 2, recompute": dataclasses.replace(PACKED, tensor=2, recompute="full"),
}
QWEN = {"qwen": dataclasses.replace(NSA, family="qwen3")}
QWEN_ON_TWO = {"qwen, tp 2": dataclasses.replace(NSA, family="qwen3", tensor=2)}
SAVED = dataclasses.replace(NSA, distributed_optimizer=True, grad_clip=0.5)


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Measured]]:
    """Case name -> what each rank measured."""
    return measured_steps({1: ALONE | QWEN, 2: ON_TWO | QWEN_ON_TWO})


@pytest.mark.parametrize("name", [*list(ALONE)[2:], *ON_TWO, *QWEN_ON_TWO])
def test_step_equals_one_process(measured: dict[str, list[Measured]], name: str) -> None:
    reference = measured[name.split(",")[0]]
    for rank in measured[name]:
        assert rank.losses == pytest.approx(reference[0].losses, rel=1e-6)
        assert rank.grad_norm == pytest.approx(reference[0].grad_norm, rel=1e-5)
    found, wanted = joined(measured[name], "gradients"), joined(reference, "gradients")
    without = [weight for weight, gradient in wanted.items() if not gradient.any()]
    assert without == ["decoder.layers.1.self_attention.core_attention.attention.summary_query"]
    assert not found.pop(without[0]).any()
    del wanted[without[0]]
    assert_same(found, wanted, relative=1e-5)


def test_weights_are_those_that_the_table_names(measured: dict[str, list[Measured]]) -> None:
    """Each is drawn, and each gets a gradient."""
    attention = AttentionConfig(kind=NSA.kind, top_chunks=TOP_CHUNKS, nsa=NSA.nsa, chunk_size=CHUNK_SIZE)
    table = nsa_parameters(MODEL, attention)
    gradients = joined(measured["nsa"], "gradients")
    assert len(table) == 8
    assert {name: tuple(gradients[name].shape) for name in table} == table
    assert all(gradients[name].any() for name in table)
    of_every_layer = {name.replace("layers.0", "layers.1") for name in gradients if "layers.0" in name}
    assert {name for name in gradients if "layers.1" in name} == of_every_layer | table.keys()


@pytest.mark.parametrize("name", [*ALONE, *ON_TWO])
def test_both_layers_have_statistics(measured: dict[str, list[Measured]], name: str) -> None:
    for rank in measured[name]:
        assert len(rank.density) == len(rank.selected) == len(rank.maps) == 2
        if not name.startswith("packed"):
            selected = density_of(TOP_CHUNKS)
            assert rank.density[1] == pytest.approx(selected)
            selected_of_map, available_of_map = rank.maps[1]
            assert float(selected_of_map.sum() / available_of_map.sum()) == pytest.approx(selected)


def test_a_run_continues_from_its_checkpoint_at_other_layouts(tmp_path: Path) -> None:
    loads = [
        ("nsa", dataclasses.replace(SAVED, **change)) for change in ({"context": 2}, {"tensor": 2}, {"pipeline": 2})
    ]
    (losses,) = run_ranks("tests.megatron.megatron_jobs:train_and_save", 1, {"nsa": SAVED}, tmp_path, cpu_only=True)
    after = losses["nsa"][STEPS_BEFORE_SAVE:]
    for results in run_ranks("tests.megatron.megatron_jobs:load_and_train", 2, loads, tmp_path, cpu_only=True):
        for changes, step, found in results:
            assert (changes, step) == ([], STEPS_BEFORE_SAVE)
            assert found == pytest.approx(after, rel=1e-5)
    with pytest.raises(ValueError, match="layers of kind nsa are computed in training and by `dash-dist evaluate`"):
        export_weights(tmp_path / "nsa", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = dataclasses.replace(SAVED, kind=("dash", "topk"), nsa=None)
    with pytest.raises(Exception, match=r"nsa_layers is \[1\] in the checkpoint and None in this run"):
        run_ranks("tests.megatron.megatron_jobs:load_and_train", 1, [("nsa", other)], tmp_path, cpu_only=True)


def test_branches_start_with_the_keys_and_values_of_given_weights() -> None:
    """Given weights know nothing of nsa: what they lack is drawn as in a run without them."""
    for tensor in (1, 2):
        for found in run_ranks(
            "tests.megatron.nsa_jobs:started", tensor, dataclasses.replace(NSA, tensor=tensor), cpu_only=True
        ):
            assert found == {"window keys": True, "window values": True, "given": True, "drawn": True}

"""Layers of several kinds in one model give the same step at every parallel layout."""

import dataclasses

import pytest

from tests.megatron.test_layouts import assert_same, joined, measured_steps
from tests.support.models import SEQUENCES, Case, Measured

pytestmark = pytest.mark.slow

WINDOW = Case(kind=("window", "dash"), window=37)  # longer than a piece of two ranks in zigzag
DENSE = Case(kind=("dash", "dense"))
PACKED = dataclasses.replace(WINDOW, packed=True)
ALONE = {
    "window": dataclasses.replace(WINDOW, micro_batch_size=SEQUENCES),
    "dense": dataclasses.replace(DENSE, micro_batch_size=SEQUENCES),
    "packed": PACKED,
    "olmo": dataclasses.replace(WINDOW, family="olmo2", micro_batch_size=SEQUENCES),
    "window, recompute": dataclasses.replace(WINDOW, recompute="full"),
}
ON_TWO = {
    "window, cp 2": dataclasses.replace(WINDOW, context=2),
    "window, cp 2, recompute": dataclasses.replace(WINDOW, context=2, recompute="full"),
    "window, tp 2": dataclasses.replace(WINDOW, tensor=2),
    "window, pp 2": dataclasses.replace(WINDOW, pipeline=2),
    "olmo, tp 2": dataclasses.replace(WINDOW, family="olmo2", tensor=2),
    "dense, cp 2": dataclasses.replace(DENSE, context=2),
    "dense, pp 2": dataclasses.replace(DENSE, pipeline=2),
    "packed, cp 2, recompute": dataclasses.replace(PACKED, context=2, recompute="full"),
}
ON_FOUR = {
    "olmo, tp 2, cp 2, recompute": dataclasses.replace(WINDOW, family="olmo2", tensor=2, context=2, recompute="full"),
    "window, tp 2, cp 2": dataclasses.replace(WINDOW, tensor=2, context=2),
    "packed, cp 2, pp 2, recompute": dataclasses.replace(PACKED, context=2, pipeline=2, recompute="full"),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Measured]]:
    """Case name -> what each rank measured."""
    return measured_steps({1: ALONE, 2: ON_TWO, 4: ON_FOUR})


@pytest.mark.parametrize("name", [*list(ALONE)[4:], *ON_TWO, *ON_FOUR])
def test_step_equals_one_process(measured: dict[str, list[Measured]], name: str) -> None:
    reference = measured[name.split(",")[0]]
    for rank in measured[name]:
        assert rank.losses == pytest.approx(reference[0].losses, rel=1e-6)
        assert rank.grad_norm == pytest.approx(reference[0].grad_norm, rel=1e-5)
    found, wanted = joined(measured[name], "gradients"), joined(reference, "gradients")
    without = [weight for weight, gradient in wanted.items() if not gradient.any()]
    assert len(without) == 1  # the summary_query of the layer without routing
    assert not found[without[0]].any()
    assert "layers.0" in without[0] if "dense" not in name else "layers.1" in without[0]
    for gradients in (found, wanted):
        del gradients[without[0]]
    assert_same(found, wanted, relative=1e-5)


@pytest.mark.parametrize("name", [*ALONE, *ON_TWO, *ON_FOUR])
def test_only_layers_with_routing_have_statistics_and_maps(measured: dict[str, list[Measured]], name: str) -> None:
    for rank in measured[name]:
        assert len(rank.density) == len(rank.selected) == len(rank.maps) == 1
        assert 0.1 < rank.density[0] < 1.0


def test_kinds_make_a_difference(measured: dict[str, list[Measured]]) -> None:
    losses = {name: measured[name][0].losses[0] for name in ("window", "dense", "packed", "olmo")}
    assert len({round(loss, 4) for loss in losses.values()}) == 4


def test_norms_over_all_heads_have_gradients(measured: dict[str, list[Measured]]) -> None:
    gradients = joined(measured["olmo"], "gradients")
    found = [name for name in gradients if "_layernorm" in name]
    assert len(found) == 2 * 4 + 1  # of queries, keys, attention and MLP in each layer; the last one
    for name in found:
        assert gradients[name].norm() > 1e-6, name

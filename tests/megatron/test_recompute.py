"""Recomputation changes no bit of a step, and runs the kernels of the attention once where their output is kept."""

import dataclasses

import pytest
import torch

from tests.support.models import SEQUENCES, Case, Measured
from tests.support.ranks import run_ranks

WINDOW = Case(kind=("window", "dash"), window=37)
DENSE = Case(kind=("dash", "dense"))
ALONE = {
    "alone": Case(),
    "two sequences": Case(micro_batch_size=2),
    "packed": Case(packed=True),
    "dense": DENSE,
    "packed dense": dataclasses.replace(DENSE, packed=True),
    "window": dataclasses.replace(WINDOW, micro_batch_size=2),
    "olmo": dataclasses.replace(WINDOW, family="olmo2"),
}
ON_TWO = {
    "cp 2": Case(context=2, exchange="selective", micro_batch_size=2),
    "cp 2, ring": Case(context=2, exchange="ring"),
    "cp 2, allgather": Case(context=2, exchange="allgather"),
    "packed, cp 2": Case(packed=True, context=2),
    "dense, cp 2": dataclasses.replace(DENSE, context=2),
    "window, cp 2": dataclasses.replace(WINDOW, context=2),
    "tp 2": Case(tensor=2),
    "pp 2": Case(pipeline=2),
    "packed, pp 2": Case(packed=True, pipeline=2),
}
ON_FOUR = {"tp 2, cp 2": Case(tensor=2, context=2), "cp 2, pp 2": Case(context=2, pipeline=2)}
LAYOUTS = ALONE | ON_TWO | ON_FOUR
WAYS = {
    "none": Case(),
    "full": Case(recompute="full"),
    "selective": Case(recompute="selective"),
    "projections": Case(recompute="selective", recompute_modules=("projections",)),
    "mlp": Case(recompute="selective", recompute_modules=("mlp",)),
}


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], list[Measured]]:
    """Layout and way to recompute -> measurements of each rank."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for world_size, layouts in ((1, ALONE), (2, ON_TWO), (4, ON_FOUR)):
        cases = {
            (name, way): dataclasses.replace(layout, recompute=how.recompute, recompute_modules=how.recompute_modules)
            for name, layout in layouts.items()
            for way, how in WAYS.items()
        }
        by_rank = run_ranks("tests.megatron.megatron_jobs:measure_steps", world_size, cases, cpu_only=True)
        found |= {case: [rank[case] for rank in by_rank] for case in cases}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way != "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bit_of_a_step_changes(measured: dict[tuple[str, str], list[Measured]], layout: str, way: str) -> None:
    for found, plain in zip(measured[layout, way], measured[layout, "none"], strict=True):
        assert (found.losses, found.grad_norm, found.tokens) == (plain.losses, plain.grad_norm, plain.tokens)
        assert (found.density, found.selected) == (plain.density, plain.selected)
        for (selected, available), (plain_selected, plain_available) in zip(found.maps, plain.maps, strict=True):
            assert torch.equal(selected, plain_selected)
            assert torch.equal(available, plain_available)
        assert found.gradients.keys() == plain.gradients.keys()
        for name, (gradient, _) in plain.gradients.items():
            assert torch.equal(found.gradients[name][0], gradient), name
            assert torch.equal(found.weights[name][0], plain.weights[name][0]), name


def test_kernels_of_the_attention_run_once_where_their_output_is_kept() -> None:
    ways = {way: WAYS[way] for way in ("none", "full", "selective", "projections", "mlp")}
    cases = ways | {
        f"{kind} {way}": dataclasses.replace(of_kind, recompute=ways[way].recompute)
        for kind, of_kind in (("dense", DENSE), ("window", WINDOW))
        for way in ("none", "full", "selective")
    }
    (calls,) = run_ranks("tests.megatron.recompute_jobs:calls_of_a_step", 1, cases, cpu_only=True)
    once, layers = SEQUENCES, 2
    stages = ("summarize", "route", "attend", "key_gradient")
    plain = dict.fromkeys(stages, layers * once)
    for way in ("none", "selective", "projections", "mlp"):
        assert calls[way] == plain, way
    assert calls["full"] == plain | {"summarize": 2 * layers * once, "attend": 2 * layers * once}
    for kind in ("dense", "window"):
        plain = dict.fromkeys((*stages, kind), once)
        assert calls[f"{kind} none"] == calls[f"{kind} selective"] == plain
        assert calls[f"{kind} full"] == plain | dict.fromkeys(("summarize", "attend", kind), 2 * once)


@pytest.mark.parametrize("case", [Case(recompute="selective"), dataclasses.replace(WINDOW, recompute="selective")])
def test_nothing_is_kept_beyond_a_step(case: Case) -> None:
    (found,) = run_ranks("tests.megatron.recompute_jobs:passes_that_wait", 1, case, cpu_only=True)
    assert found["after a step"] == found["after an evaluation"] == ([0, 0], 0)
    assert found["after a failed step"] == [1, 1]
    assert found["loss after the failed one"] == found["loss"]
    assert found["after the step that follows"] == ([0, 0], 0)

"""Recomputation changes no bit of a step, and computes nothing twice that is kept or that nobody reads."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.support.cases import asked, exhaustive
from tests.support.models import SEQUENCES, Case, Measured
from tests.support.ranks import run_ranks

WINDOW = Case(kind=("window", "dash"), window=37)
DENSE = Case(kind=("dash", "dense"))
ALONE = {
    "alone": Case(micro_batch_size=1),
    "two sequences": Case(),
    "packed": Case(packed=True),
    "dense": DENSE,
    "packed dense": dataclasses.replace(DENSE, packed=True),
    "window": dataclasses.replace(WINDOW),
    "olmo": dataclasses.replace(WINDOW, family="olmo2"),
    "fp8": Case(fp8_linears=True),
    "fp8 olmo": Case(fp8_linears=True, family="olmo2"),
}
ON_TWO = {
    "cp 2": Case(context=2, exchange="selective"),
    "cp 2, ring": Case(context=2, exchange="ring"),
    "cp 2, allgather": Case(context=2, exchange="allgather"),
    "packed, cp 2": Case(packed=True, context=2),
    "dense, cp 2": dataclasses.replace(DENSE, context=2),
    "window, cp 2": dataclasses.replace(WINDOW, context=2),
    "tp 2": Case(tensor=2),
    "pp 2": Case(pipeline=2),
    "packed, pp 2": Case(packed=True, pipeline=2),
    "fp8, cp 2": Case(fp8_linears=True, context=2),
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
IN_ONE_LAYER = {
    "full, one layer": Case(recompute="full", recompute_layers=1),
    "selective, one layer": Case(recompute="selective", recompute_layers=1),
    "mlp, one layer": Case(recompute="selective", recompute_modules=("mlp",), recompute_layers=1),
}
LAYOUTS_OF_ONE_LAYER = ("packed", "olmo", "cp 2", "tp 2", "fp8")
CASES = [
    *((layout, way) for layout in LAYOUTS for way in WAYS),
    *((layout, way) for layout in LAYOUTS_OF_ONE_LAYER for way in IN_ONE_LAYER),
]
# Elsewhere, `selective` recomputes both, and those of one layer what those of all do.
EXHAUSTIVE = [
    case
    for case in CASES
    if case[1] in ("projections", "mlp", *IN_ONE_LAYER)
    and case[0] not in ("packed", "olmo", "cp 2", "tp 2, cp 2", "fp8")
]
FROZEN = {"parameters": [{"match": "*.mlp.linear_fc1.weight"}, {"match": "*layernorm.weight"}]}
LORA = {"lora": {"rank": 4}}


def computed_by(layout: Case, way: str) -> Case:
    how = (WAYS | IN_ONE_LAYER)[way]
    return dataclasses.replace(
        layout,
        recompute=how.recompute,
        recompute_modules=how.recompute_modules,
        recompute_layers=how.recompute_layers,
    )


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[tuple[str, str], list[Measured]]:
    """Layout and way to recompute -> measurements of each rank."""
    found: dict[tuple[str, str], list[Measured]] = {}
    wanted = asked(request, "case")
    wanted |= {(layout, "none") for layout, _ in wanted}
    for world_size, layouts in ((1, ALONE), (2, ON_TWO), (4, ON_FOUR)):
        cases = {
            (name, way): computed_by(layouts[name], way)
            for name, way in CASES
            if name in layouts and (name, way) in wanted
        }
        by_rank = run_ranks("tests.megatron.megatron_jobs:measure_steps", world_size, cases, cpu_only=True)
        found |= {case: [rank[case] for rank in by_rank] for case in cases}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", exhaustive([case for case in CASES if case[1] != "none"], EXHAUSTIVE), ids="-".join)
def test_no_bit_of_a_step_changes(measured: dict[tuple[str, str], list[Measured]], case: tuple[str, str]) -> None:
    layout, way = case
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
    cases = WAYS | {
        f"{kind} {way}": dataclasses.replace(of_kind, recompute=WAYS[way].recompute)
        for kind, of_kind in (("dense", DENSE), ("window", WINDOW))
        for way in ("none", "full", "selective")
    }
    (calls,) = run_ranks("tests.megatron.recompute_jobs:calls_of_a_step", 1, cases, cpu_only=True)
    once, layers = SEQUENCES // Case().micro_batch_size, 2
    stages = ("summarize", "route", "attend", "key_gradient")
    plain = dict.fromkeys(stages, layers * once)
    for way in ("none", "selective", "projections", "mlp"):
        assert calls[way] == plain, way
    assert calls["full"] == plain | {"summarize": 2 * layers * once, "attend": 2 * layers * once}
    for kind in ("dense", "window"):
        plain = dict.fromkeys((*stages, kind), once)
        assert calls[f"{kind} none"] == calls[f"{kind} selective"] == plain
        assert calls[f"{kind} full"] == plain | dict.fromkeys(("summarize", "attend", kind), 2 * once)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Case(), Case(tensor=2), Case(pipeline=2), Case(fp8_linears=True)],
    ids=["alone", "tp 2", "pp 2", "fp8"],
)
@pytest.mark.parametrize("trainable", [FROZEN, LORA], ids=["frozen", "lora"])
def test_no_bit_of_the_gradients_changes_of_frozen_weights_and_adapters(
    trainable: dict[str, Any], layout: Case
) -> None:
    cases = {way: computed_by(layout, way) for way in WAYS | IN_ONE_LAYER}
    ranks = layout.tensor * layout.pipeline
    for of_rank in run_ranks(
        "tests.megatron.recompute_jobs:gradients_of_cases", ranks, cases, trainable, cpu_only=True
    ):
        for way, gradients in of_rank.items():
            assert gradients.keys() == of_rank["none"].keys()
            for name, gradient in of_rank["none"].items():
                assert torch.equal(gradients[name], gradient), (way, name)


@pytest.mark.slow
def test_stages_recompute_their_first_layers() -> None:
    cases = {way: computed_by(Case(pipeline=2), way) for way in ("none", *IN_ONE_LAYER)}
    for by_way in run_ranks("tests.megatron.offload_jobs:two_steps", 2, cases, cpu_only=True):
        plain = by_way.pop("none")
        for way, found in by_way.items():
            assert found["results"] == plain["results"], way
            for name, gradient in plain["gradients"].items():
                assert torch.equal(found["gradients"][name], gradient), (way, name)


OLMO = Case(family="olmo2")
PRODUCTS = {
    # name: (case, forward products of a layer's qkv, proj, fc1 and fc2)
    "none": (WAYS["none"], (1, 1, 1, 1)),
    "full": (WAYS["full"], (2, 2, 2, 1)),
    "selective": (WAYS["selective"], (2, 2, 2, 1)),
    "projections": (WAYS["projections"], (2, 1, 1, 1)),
    "mlp": (WAYS["mlp"], (1, 1, 2, 1)),
    "one layer": (IN_ONE_LAYER["full, one layer"], (1.5, 1.5, 1.5, 1)),
    "mlp of one layer": (IN_ONE_LAYER["mlp, one layer"], (1, 1, 1.5, 1)),
    "tiled": (Case(mlp_tile_tokens=24), (1, 1, 2, 1)),
    "tiled, full": (Case(mlp_tile_tokens=24, recompute="full"), (2, 2, 2, 1)),
    "fp8, full": (Case(fp8_linears=True, recompute="full"), (2, 2, 2, 1)),
    # A norm reads the outputs of the last linears.
    "olmo, full": (computed_by(OLMO, "full"), (2, 2, 2, 2)),
    "olmo, projections": (computed_by(OLMO, "projections"), (2, 2, 1, 1)),
    "olmo, mlp": (computed_by(OLMO, "mlp"), (1, 1, 2, 2)),
}


@pytest.mark.slow
def test_no_product_is_computed_again_whose_output_nobody_reads() -> None:
    cases = {name: case for name, (case, _) in PRODUCTS.items()}
    (found,) = run_ranks("tests.megatron.recompute_jobs:products_of_a_step", 1, cases, cpu_only=True)
    for name, (_, expected) in PRODUCTS.items():
        assert found[name] == dict(zip(("qkv", "proj", "fc1", "fc2"), expected, strict=True)), name


def test_ranks_do_not_sum_again_what_nobody_reads() -> None:
    split = {"tensor": 2, "sequence_parallel": False}  # else the sums are scattered
    cases = {name: dataclasses.replace(WAYS[name], **split) for name in ("none", "full", "projections", "mlp")}
    found, _ = run_ranks("tests.megatron.recompute_jobs:sums_of_a_step", 2, cases, cpu_only=True)
    assert found["projections"] == found["mlp"] == found["none"]
    # One in each layer, after the attention.
    assert found["full"] == found["none"] + 2 * SEQUENCES // Case().micro_batch_size


def test_who_reads_what_was_left_out_gets_nan() -> None:
    (found,) = run_ranks("tests.megatron.recompute_jobs:norm_with_a_reader", 1, WAYS, cpu_only=True)
    assert found.pop("none") > 0
    for way, norm in found.items():
        assert norm != norm, way


@pytest.mark.parametrize("case", [Case(recompute="selective"), dataclasses.replace(WINDOW, recompute="selective")])
def test_nothing_is_kept_beyond_a_step(case: Case) -> None:
    (found,) = run_ranks("tests.megatron.recompute_jobs:passes_that_wait", 1, case, cpu_only=True)
    assert found["after a step"] == found["after an evaluation"] == ([0, 0], 0)
    assert found["after a failed step"] == [1, 1]
    assert found["loss after the failed one"] == found["loss"]
    assert found["after the step that follows"] == ([0, 0], 0)

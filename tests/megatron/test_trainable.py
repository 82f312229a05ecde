"""Frozen weights cost nothing and stay; the others train as they would, at every layout and after a resume."""

import dataclasses
from typing import Any

import pytest
import torch

from dash_dist.config.trainable import TrainableSection
from dash_dist.models.table import parameter_table
from tests.megatron.test_layouts import assert_same, joined
from tests.support.cases import asked, exhaustive
from tests.support.models import MODEL, SEQUENCE_LENGTH, SEQUENCES, VOCAB_SIZE, Case
from tests.support.ranks import run_ranks

JOBS = "tests.megatron.trainable_jobs"
ALONE = Case(grad_clip=0.5)
QUERY = [{"match": "*summary_query", "lr": 4e-2}]
MIXED = [*QUERY, {"match": "decoder.layers.1.self_attention.*"}]
FIRST_LAYER = [{"match": "decoder.layers.0.mlp.*", "lr": 5e-3}]
LAST_LAYER = [{"match": "decoder.layers.1.mlp.*"}, {"match": "decoder.final_layernorm.weight"}]
SETS = {"query": QUERY, "mixed": MIXED, "first layer": FIRST_LAYER, "last layer": LAST_LAYER}
STEPS = 3
NAMES = list(parameter_table(MODEL, VOCAB_SIZE))
ONE_EACH = dataclasses.replace(ALONE, micro_batch_size=1)
RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "mlp": {"recompute": "selective", "recompute_modules": ("mlp",)},
    "projections": {"recompute": "selective", "recompute_modules": ("projections",)},
}
RECOMPUTED = [
    *((name, "full") for name in SETS),
    *((name, way) for name in ("query", "first layer") for way in RECOMPUTE if way != "full"),
]
LAYOUTS = {
    "cp, distributed": dataclasses.replace(ALONE, context=2, distributed_optimizer=True),
    "tp": dataclasses.replace(ALONE, tensor=2),
    "dp": ONE_EACH,
    "dp, distributed": dataclasses.replace(ONE_EACH, distributed_optimizer=True),
    "pp, distributed": dataclasses.replace(ALONE, pipeline=2, distributed_optimizer=True),
    "pp, recompute": dataclasses.replace(ALONE, pipeline=2, recompute="full"),
    "pp, tied": dataclasses.replace(ALONE, pipeline=2, tie_embeddings=True),
}
# Where a pipeline is cut, each set lies in other stages.
PAIRS = [
    *(("mixed", name) for name in LAYOUTS),
    *((sets, name) for name in ("pp, distributed", "pp, tied") for sets in SETS if sets != "mixed"),
    ("query", "dp"),
    ("first layer", "tp"),
    ("first layer", "pp, recompute"),
    ("last layer", "cp, distributed"),
    ("last layer", "dp, distributed"),
]
EXHAUSTIVE = [
    ("mixed", "dp"),
    ("query", "dp"),
    ("first layer", "tp"),
    ("last layer", "cp, distributed"),
    ("last layer", "dp, distributed"),
    *((sets, "pp, tied") for sets in ("query", "first layer")),
]


def assert_same_weights(actual: list[Any], expected: list[Any], *, relative: float) -> None:
    """As `assert_same`; a frozen `summary_query` is zero, and has no relative error."""
    weights = joined(expected, "weights")
    zero = {name for name, weight in weights.items() if not weight.any()}
    found = joined(actual, "weights")
    assert {name for name, weight in found.items() if not weight.any()} == zero
    assert_same(
        {name: weight for name, weight in found.items() if name not in zero},
        {name: weight for name, weight in weights.items() if name not in zero},
        relative,
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    cases = {name: (ALONE, patterns) for name, patterns in SETS.items()}
    cases |= {
        f"{name}, recompute {way}": (dataclasses.replace(ALONE, **RECOMPUTE[way]), SETS[name])
        for name, way in RECOMPUTED
    }
    cases |= {f"{name}, tied": (dataclasses.replace(ALONE, tie_embeddings=True), SETS[name]) for name in SETS}
    cases |= {"all": (ALONE, None)}
    (seen,) = run_ranks(f"{JOBS}:run_all", 1, cases, STEPS, cpu_only=True)
    return seen


@pytest.fixture(scope="module")
def on_two(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    pairs = asked(request, "pair")
    cases = {f"{sets}, {name}": (LAYOUTS[name], SETS[sets]) for sets, name in PAIRS if (sets, name) in pairs}
    ranks = run_ranks(f"{JOBS}:run_all", 2, cases, STEPS, cpu_only=True)
    return {name: [rank[name] for rank in ranks] for name in cases}


def trained(patterns: list[dict[str, Any]]) -> set[str]:
    return set(TrainableSection.model_validate({"parameters": patterns}).learning_rates(NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("sets", SETS)
def test_only_the_named_parameters_move_and_have_gradients_and_state(alone: dict[str, Any], sets: str) -> None:
    seen, everything = alone[sets], alone["all"]
    names = trained(SETS[sets])
    assert seen.gradients.keys() == names
    assert everything.gradients.keys() == set(NAMES)
    for name in names:
        torch.testing.assert_close(seen.gradients[name][0], everything.gradients[name][0], rtol=1e-4, atol=1e-7)
        assert not torch.equal(seen.weights[name][0], initial(alone, sets)[name][0])
    for name in set(NAMES) - names:
        assert torch.equal(seen.weights[name][0], initial(alone, sets)[name][0]), name
    elements = sum(seen.weights[name][0].numel() for name in names)
    assert seen.state_elements == seen.buffer_elements == elements
    norm = torch.stack([seen.gradients[name][0].norm() for name in names]).norm()
    assert seen.grad_norms[0] == pytest.approx(norm.item(), rel=1e-4)


def initial(alone: dict[str, Any], sets: str) -> dict[str, Any]:
    """Weights before training: those that another set left frozen, by name."""
    others = [name for name in SETS if name != sets]
    found = {}
    for name in NAMES:
        frozen = [other for other in others if name not in trained(SETS[other])]
        found[name] = alone[frozen[0]].weights[name]
    return found


@pytest.mark.slow
def test_frozen_weights_cost_no_product(alone: dict[str, Any]) -> None:
    """The step lacks the weight gradients of all linears, and the input gradient of the first."""
    tokens = SEQUENCES * SEQUENCE_LENGTH
    linears = [name for name in NAMES if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))]
    elements = sum(alone["all"].weights[name][0].numel() for name in [*linears, "output_layer.weight"])
    first = alone["all"].weights["decoder.layers.0.self_attention.linear_qkv.weight"][0].numel()
    assert alone["all"].flops - alone["query"].flops == 2 * tokens * (elements + first)


@pytest.mark.slow
def test_learning_rates_of_groups_follow_one_schedule(alone: dict[str, Any]) -> None:
    for base, *groups in alone["mixed"].learning_rates:
        assert groups == pytest.approx([base, 4 * base])
    assert [base for base, *_ in alone["mixed"].learning_rates[:2]] == pytest.approx([5e-3, 1e-2])
    for base, *groups in alone["query"].learning_rates:
        assert groups == pytest.approx([4 * base])


@pytest.mark.slow
@pytest.mark.parametrize("pair", exhaustive(PAIRS, EXHAUSTIVE), ids="-".join)
def test_every_layout_trains_the_same(
    alone: dict[str, Any], on_two: dict[str, list[Any]], pair: tuple[str, str]
) -> None:
    sets, name = pair
    reference = alone[f"{sets}, tied" if "tied" in name else sets]
    ranks = on_two[f"{sets}, {name}"]
    for rank in ranks:
        assert rank.losses == pytest.approx(reference.losses, rel=1e-6)
        assert rank.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    assert_same_weights(ranks, [reference], relative=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("sets", "way"), RECOMPUTED)
def test_recomputation_trains_what_a_frozen_embedding_precedes(alone: dict[str, Any], sets: str, way: str) -> None:
    assert_same_weights([alone[f"{sets}, recompute {way}"]], [alone[sets]], relative=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_a_resume_continues_exactly_at_another_layout(tmp_path, distributed: bool) -> None:
    two = dataclasses.replace(ALONE, pipeline=2, distributed_optimizer=distributed)
    one = dataclasses.replace(ALONE, distributed_optimizer=distributed)
    for patterns, folder in ((QUERY, tmp_path / "query"), (FIRST_LAYER, tmp_path / "first")):
        saved = run_ranks(f"{JOBS}:save", 2, two, patterns, folder, 2, cpu_only=True)
        ((resumed, changes, moments, updates),) = run_ranks(
            f"{JOBS}:resume", 1, one, patterns, folder, 2, cpu_only=True
        )
        assert changes == []
        assert updates == 2
        assert all(moments.values())
        assert resumed.losses == pytest.approx(saved[0].losses[2:], rel=1e-6)
        assert_same_weights([resumed], saved, relative=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", [ALONE, dataclasses.replace(ALONE, tensor=2), ONE_EACH], ids=["1", "tp 2", "dp 2"])
def test_a_resume_with_other_parameters_keeps_the_state_of_those_in_both(tmp_path, case: Case) -> None:
    world = 1 if case == ALONE else 2
    everything = run_ranks(f"{JOBS}:save", world, case, None, tmp_path / "all", 2, cpu_only=True)
    kept, *_ = run_ranks(f"{JOBS}:resume", world, case, MIXED, tmp_path / "all", 1, cpu_only=True)
    assert kept[1:] == ([], dict.fromkeys(trained(MIXED), True), 2)
    assert kept[0].losses[0] == pytest.approx(everything[0].losses[2], rel=1e-6)

    run_ranks(f"{JOBS}:save", world, case, QUERY, tmp_path / "query", 2, cpu_only=True)
    mixed, *_ = run_ranks(f"{JOBS}:resume", world, case, MIXED, tmp_path / "query", 1, cpu_only=True)
    assert {name for name, any_moment in mixed[2].items() if any_moment} == trained(QUERY)
    count = len(trained(MIXED)) - len(trained(QUERY))
    assert mixed[1] == [f"{count} trained parameters have no optimizer state in the checkpoint: it starts anew"]
    assert mixed[3] == 2
    other, *_ = run_ranks(f"{JOBS}:resume", world, case, LAST_LAYER, tmp_path / "query", 1, cpu_only=True)
    assert not any(other[2].values())
    assert other[3] == 0  # nothing is left of the state that was counted


def test_patterns_that_cannot_train_are_refused() -> None:
    (message,) = run_ranks(f"{JOBS}:refused", 1, [{"match": "*linear_kqv*"}], cpu_only=True)
    assert "near misses are decoder.layers.*.self_attention.linear_qkv.weight" in message

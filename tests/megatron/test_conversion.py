"""The conversion phase trains `summary_query` by each layer's distance from its dense output, and nothing else."""

import dataclasses
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dash_dist.config.run import RunConfig
from tests.megatron.test_layouts import assert_same, joined
from tests.planning.planning_cases import small_config
from tests.support.models import MODEL, Case
from tests.support.ranks import run_ranks

JOBS = "tests.megatron.conversion_jobs"
QUERY = {"parameters": [{"match": "*.summary_query"}]}
OUTPUT = {"conversion": "output"}
ALONE = Case()
STEPS = 6
LAYOUTS = {
    "recompute": dataclasses.replace(ALONE, recompute="full"),
    "selective": dataclasses.replace(ALONE, recompute="selective"),
    "packed": dataclasses.replace(ALONE, packed=True),
}
ON_TWO = {
    "cp": Case(context=2),
    "cp, recompute": Case(context=2, recompute="full"),
    "tp": Case(tensor=2),
    "dp": Case(),
    "pp": Case(pipeline=2),
    "pp, recompute": Case(pipeline=2, recompute="full"),
    "pp, selective": Case(pipeline=2, recompute="selective"),
}


@pytest.fixture(scope="module")
def alone() -> tuple[Any, list[float]]:
    (found,) = run_ranks(f"{JOBS}:run_all", 1, {"alone": ALONE, **LAYOUTS}, STEPS, cpu_only=True)
    return found


@pytest.mark.slow
def test_gradients_are_those_of_the_definition() -> None:
    ((seen, local, inputs),) = run_ranks(f"{JOBS}:run", 1, ALONE, OUTPUT, QUERY, 1, True, cpu_only=True)
    (layers,) = run_ranks(f"{JOBS}:explicit", 1, inputs, cpu_only=True)
    assert local[0] == pytest.approx(sum(loss for loss, _ in layers) / MODEL.num_layers, rel=1e-4)
    assert len(seen.gradients) == MODEL.num_layers
    for layer, (_, gradient) in enumerate(layers):
        name = f"decoder.layers.{layer}.self_attention.core_attention.attention.summary_query"
        error = (seen.gradients[name][0].double() - gradient).norm() / gradient.norm()
        assert gradient.norm() > 0
        assert error < 1e-3


@pytest.mark.slow
def test_local_losses_fall_while_the_dense_model_stays(alone: dict[str, Any]) -> None:
    ((dense, _, _),) = run_ranks(f"{JOBS}:run", 1, ALONE, {"kind": "dense"}, QUERY, 1, cpu_only=True)
    seen, local, _ = alone["alone"]
    assert seen.losses == pytest.approx([dense.losses[0]] * STEPS, rel=1e-6)
    assert local[-1] < local[0]
    for name, (weight, _) in seen.weights.items():
        assert torch.equal(weight, dense.weights[name][0]) != name.endswith("summary_query")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ON_TWO, "recompute", "selective"])
def test_every_layout_trains_the_same(alone: dict[str, Any], on_two: dict[str, list[Any]], name: str) -> None:
    reference, expected, _ = alone["alone"]
    ranks = on_two[name] if name in on_two else [alone[name]]
    for seen, local, _ in ranks:
        assert seen.losses == pytest.approx(reference.losses, rel=1e-6)
        assert local == pytest.approx(expected, rel=1e-5)
        assert seen.grad_norms == pytest.approx(reference.grad_norms, rel=1e-4)
    assert_same(joined([seen for seen, *_ in ranks], "weights"), joined([reference], "weights"), relative=1e-4)


@pytest.fixture(scope="module")
def on_two() -> dict[str, list[Any]]:
    by_rank = run_ranks(f"{JOBS}:run_all", 2, ON_TWO, STEPS, cpu_only=True)
    return {name: [rank[name] for rank in by_rank] for name in ON_TWO}


@pytest.mark.slow
def test_packed_documents_have_a_dense_layer_each(alone: dict[str, Any]) -> None:
    seen, local, _ = alone["packed"]
    assert len(set(seen.losses)) == 1
    assert 0 < local[-1] < local[0]


@pytest.mark.parametrize(("trainable", "name"), [({}, "embedding.word_embeddings.weight"), ({"lora": {}}, "lora")])
def test_more_than_the_routing_is_refused(trainable: dict[str, Any], name: str) -> None:
    (message,) = run_ranks(f"{JOBS}:refused", 1, trainable, cpu_only=True)
    assert message.startswith(f"attention.conversion trains summary_query alone, and {name} would get no gradient")


def test_deepspeed_and_dense_attention_are_refused() -> None:
    routing = {"parameters": ({"match": "*.summary_query"},)}
    config = small_config(attention=OUTPUT, trainable=routing)
    with pytest.raises(ValidationError, match=r"attention\.conversion is given, and attention\.kind dense"):
        small_config(attention={**OUTPUT, "kind": "dense"})
    with pytest.raises(ValidationError, match="engine: deepspeed trains by the loss of the model only"):
        RunConfig.model_validate({**config.model_dump(), "engine": "deepspeed"})

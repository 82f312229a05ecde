"""Ways to recompute: the settings that name them, and the table of docs/planning.md."""

from dataclasses import replace
from pathlib import Path

import pytest

from dash_dist.planning import Assumptions, Prediction, predict
from dash_dist.planning.activations import kept_by_layer, saved_by_routing
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.recompute import WAYS, Recompute, more_than
from dash_dist.planning.search import fewest_layers
from dash_dist.planning.step import layer_matmul, recomputed_matmul, sums_again
from dash_dist.planning.traffic import NO_EXCHANGE
from tests.planning.planning_cases import large_config, layout, machine, small_config

PLANNING = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_documented_bytes_and_products_are_those_that_are_counted() -> None:
    config = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 8})
    sizes = Sizes.of(config, layout(), vocab_size=128_000)
    lines = PLANNING.read_text().splitlines()
    for way in WAYS:
        kept = kept_by_layer(sizes, "dash", NO_EXCHANGE, way) / sizes.tokens
        routing = saved_by_routing(sizes, "dash") / sizes.tokens
        again = recomputed_matmul(sizes, replace(layout(), recompute=way)) / layer_matmul(sizes)
        (row,) = [line for line in lines if line.startswith(f"| `{way}` |")]
        assert row.startswith(f"| `{way}` | {kept:,.0f} | {routing:,.0f} | {100 * again:.0f}")


@pytest.mark.parametrize(
    ("norms_after", "way", "linears", "sums"),
    [
        (False, Recompute("selective", ("projections",)), {"qkv"}, 0),
        (False, Recompute("selective", ("mlp",)), {"fc1"}, 0),
        (False, Recompute("full"), {"qkv", "proj", "fc1"}, 1),
        (True, Recompute("selective", ("projections",)), {"qkv", "proj"}, 1),
        (True, Recompute("selective", ("mlp",)), {"fc1", "fc2"}, 1),
        (True, Recompute("full"), {"qkv", "proj", "fc1", "fc2"}, 2),
    ],
)
def test_only_products_that_are_read_are_computed_again(
    norms_after: bool, way: Recompute, linears: set[str], sums: int
) -> None:
    config = small_config(model={"family": "olmo2" if norms_after else "llama", "qk_norm": norms_after})
    sizes = Sizes.of(config, layout(), vocab_size=100)
    weights = {
        "qkv": sizes.hidden * (sizes.q + 2 * sizes.kv),
        "proj": sizes.q * sizes.hidden,
        "fc1": 2 * sizes.hidden * sizes.ffn,
        "fc2": sizes.hidden * sizes.ffn,
    }
    one = replace(layout(), recompute=way)
    assert recomputed_matmul(sizes, one) == 2 * sizes.tokens * sum(weights[linear] for linear in linears)
    assert sums_again(sizes, one) == sums


def of_layers(layers: int | None, **sizes: int) -> Prediction:
    """The large model at 131,072 tokens, of which some layers are recomputed."""
    config = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 8})
    one = layout(recompute="selective", layers=layers, **sizes)
    return predict(config, one, machine(one.gpus), Assumptions(), vocab_size=128_000)


def test_each_layer_that_is_not_recomputed_takes_its_time_less_and_its_memory_more() -> None:
    all_layers = of_layers(None, context=8)
    assert of_layers(32, context=8).peak == all_layers.peak
    assert of_layers(32, context=8).time == all_layers.time
    none = predict_none(context=8)
    for layers in (1, 13, 31):
        found = of_layers(layers, context=8)
        recomputed = (found.seconds - none.seconds) / (all_layers.seconds - none.seconds)
        assert recomputed == pytest.approx(layers / 32)
        assert (found.flops - none.flops) / (all_layers.flops - none.flops) == pytest.approx(layers / 32)
    held = [of_layers(layers, context=8).peak.total for layers in range(1, 33)]
    assert held == sorted(held, reverse=True)
    saved, kept = 139_784, 16_896  # of a token, from docs/planning.md
    assert held[12] - held[13] == pytest.approx((saved - kept) * 2**17 / 8 * 1.05, rel=0.01)


def predict_none(**sizes: int) -> Prediction:
    config = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 8})
    one = layout(**sizes)
    return predict(config, one, machine(one.gpus), Assumptions(), vocab_size=128_000)


def test_the_first_layers_of_every_stage_are_recomputed() -> None:
    all_layers, some, none = of_layers(8, pipeline=4), of_layers(3, pipeline=4), predict_none(pipeline=4)
    assert none.memory[0].activations > some.memory[0].activations > all_layers.memory[0].activations
    assert some.sent == all_layers.sent
    # One micro-batch: a last layer that is not computed again holds in its backward pass what a recomputed one would.
    one, every = (of_layers(layers, pipeline=4, data=8).memory[0] for layers in (7, 8))
    assert one.total == every.total
    assert none.flops < some.flops < all_layers.flops


@pytest.mark.parametrize("memory", [60.0, 79.2, 90.0, 120.0])
def test_the_fewest_layers_are_those_with_which_a_run_fits_and_does_not_warn(memory: float) -> None:
    config = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 8})
    one, on = layout(recompute="selective", tensor=4, context=2), machine(8, memory)
    found = fewest_layers(config, one, on, Assumptions(), vocab_size=128_000)
    each = [predict(config, with_layers(one, layers), on, Assumptions(), vocab_size=128_000) for layers in range(1, 33)]
    enough = [index for index, prediction in enumerate(each, start=1) if not prediction.is_tight]
    if not enough:
        assert found.layout == one
    else:
        assert found.layout == with_layers(one, enough[0])
        assert found.seconds == each[enough[0] - 1].seconds


def with_layers(one: Layout, layers: int) -> Layout:
    return replace(one, recompute=one.recompute.of_layers(layers))


def test_each_way_keeps_less_than_the_ways_before() -> None:
    for index, way in enumerate(WAYS):
        assert more_than(way) == WAYS[index + 1 :]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (Recompute(), Recompute("selective"), "parallel.recompute=selective"),
        (
            Recompute(),
            Recompute("selective", ("mlp",)),
            "parallel.recompute=selective parallel.recompute_modules=[mlp]",
        ),
        (
            Recompute("selective", ("mlp",)),
            Recompute("full"),
            "parallel.recompute=full parallel.recompute_modules=null",
        ),
        (Recompute("full", None, 3), Recompute("full", None, 5), "parallel.recompute_layers=5"),
        (Recompute("full", None, 3), Recompute("full"), "parallel.recompute_layers=null"),
        (Recompute(), Recompute("full", None, 3), "parallel.recompute=full parallel.recompute_layers=3"),
        (Recompute("full"), Recompute("full"), ""),
    ],
)
def test_a_change_names_all_settings_that_differ(before: Recompute, after: Recompute, words: str) -> None:
    assert after.overrides(before) == words

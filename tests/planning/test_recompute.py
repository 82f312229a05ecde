"""Ways to recompute: the settings that name them, and the table of docs/planning.md."""

from pathlib import Path

import pytest

from dash_dist.planning.activations import kept_by_layer, saved_by_routing
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.recompute import WAYS, Recompute, more_than
from dash_dist.planning.step import layer_matmul, recomputed_matmul
from dash_dist.planning.traffic import NO_EXCHANGE
from tests.planning.planning_cases import large_config, layout

PLANNING = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_documented_bytes_and_products_are_those_that_are_counted() -> None:
    config = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 8})
    sizes = Sizes.of(config, layout(), vocab_size=128_000)
    lines = PLANNING.read_text().splitlines()
    for way in WAYS:
        kept = kept_by_layer(sizes, "dash", NO_EXCHANGE, way) / sizes.tokens
        routing = saved_by_routing(sizes, "dash") / sizes.tokens
        again = recomputed_matmul(sizes, way) / layer_matmul(sizes)
        (row,) = [line for line in lines if line.startswith(f"| `{way}` |")]
        assert row.startswith(f"| `{way}` | {kept:,.0f} | {routing:,.0f} | {100 * again:.0f}")


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
    ],
)
def test_a_change_names_all_settings_that_differ(before: Recompute, after: Recompute, words: str) -> None:
    assert after.overrides(before) == words

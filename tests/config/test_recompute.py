"""Settings of recomputation: the default, what is recomputed, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from dash_dist.config.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [
        ({}, ()),
        ({"recompute": "full"}, ("projections", "mlp")),
        ({"recompute": "selective"}, ("projections", "mlp")),
        ({"recompute": "selective", "recompute_modules": ["mlp"]}, ("mlp",)),
    ],
)
def test_parts_of_a_layer_that_are_recomputed(settings: dict[str, Any], recomputed: tuple[str, ...]) -> None:
    assert ParallelConfig.model_validate(settings).recomputed == recomputed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recompute": "full", "recompute_modules": ["mlp"]},
            "set recompute to selective, or recompute_modules to null",
        ),
        ({"recompute_modules": ["mlp"]}, "recompute is none, which does not read it"),
        ({"recompute": "selective", "recompute_modules": []}, "name some of projections, mlp, each once"),
        ({"recompute": "selective", "recompute_modules": ["mlp", "mlp"]}, "name some of projections, mlp, each once"),
        ({"recompute": "selective", "recompute_modules": ["core_attn"]}, "'projections' or 'mlp'"),
        ({"recompute_layers": 3}, "recompute_layers is 3 and recompute is none, which does not read it: set recompute"),
        ({"recompute": "full", "recompute_layers": 0}, "recompute_layers\n  Input should be greater than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ParallelConfig.model_validate(settings)

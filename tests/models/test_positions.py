"""Limits of `model.positions`, and the factor that Megatron-core applies."""

import pytest
import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.positions import PositionsConfig
from tests.support.models import MODEL
from tests.support.ranks import run_ranks


def test_a_sequence_beyond_the_positions_is_refused() -> None:
    model = MODEL.model_copy(update={"positions": PositionsConfig(max_positions=64)})
    with pytest.raises(
        ValueError, match=r"sequence length 128 is beyond model.positions.max_positions 64: set it to 128"
    ):
        check_combination(model, AttentionConfig(), ParallelConfig(), world_size=1, sequence_length=128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "yarn", "factor": 2.0}, "needs original_max_positions"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 2.0}, "beta_fast is not a parameter of type linear"),
    ],
)
def test_parameters_are_those_of_the_type(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(MODEL.model_dump() | {"positions": settings})


def factors(wanted: list[float]) -> list[float]:
    """Factors that Megatron-core's attention reads for `wanted`."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    from dash_dist.megatron.model import transformer_config

    found = []
    for factor in wanted:
        positions = PositionsConfig(type="yarn", factor=4.0, original_max_positions=64, attention_factor=factor)
        model = MODEL.model_copy(update={"positions": positions})
        config = transformer_config(model, ParallelConfig(), dtype=torch.float32, device=torch.device("cpu"))
        found.append(yarn._yarn_get_concentration_factor_from_config(config))
    return found


def test_megatron_applies_the_attention_factor() -> None:
    wanted = [0.7, 1.0, 1.1386294361119891, 1.208]
    (found,) = run_ranks("tests.models.test_positions:factors", 1, wanted, cpu_only=True)
    assert found == pytest.approx(wanted, rel=1e-15)

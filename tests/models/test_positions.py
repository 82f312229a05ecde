"""Limits of `model.positions`, and the factor of rotated queries and keys."""

import pytest
import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.positions import PositionsConfig
from dash_dist.megatron.rotary import ShardRotaryEmbedding
from tests.support.models import MODEL


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


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.1386294361119891])
def test_cosines_and_sines_bear_the_attention_factor(factor: float) -> None:
    positions = PositionsConfig(type="yarn", factor=4.0, original_max_positions=64, attention_factor=factor)
    embedding = ShardRotaryEmbedding(
        16,
        rotary_base=1e4,
        positions=positions,
        with_unscaled=True,
        sequence_length=128,
        layout="zigzag",
        cp_rank=0,
        cp_size=1,
        device=torch.device("cpu"),
    )
    scaled, unscaled = embedding(128).square().sum(0)  # cosines and sines
    torch.testing.assert_close(scaled, torch.full_like(scaled, factor**2))
    torch.testing.assert_close(unscaled, torch.ones_like(unscaled))

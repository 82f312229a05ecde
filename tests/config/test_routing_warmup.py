"""The routing scale of a step is a function of its number alone."""

import itertools

import pytest
from pydantic import ValidationError

from dash_dist.config.attention import AttentionConfig


def attention(**settings: object) -> AttentionConfig:
    return AttentionConfig.model_validate(settings)


def test_the_scale_is_constant_by_default():
    assert {attention(routing_scale=3.0).routing_scale_at(step) for step in (0, 1, 1000)} == {3.0}


@pytest.mark.parametrize(("start", "target"), [(0.5, 8.0), (8.0, 0.5)])
def test_the_scale_moves_by_one_factor_a_step_and_stays(start, target):
    config = attention(routing_scale=target, routing_warmup={"start": start, "steps": 4})
    scales = [config.routing_scale_at(step) for step in range(1, 7)]
    assert scales[0] == start
    assert scales[4:] == [target, target]
    assert [after / before for before, after in itertools.pairwise(scales[:5])] == pytest.approx(
        [(target / start) ** 0.25] * 4
    )
    assert config.routing_scale_at(0) == start  # before the first step


def test_dense_attention_has_no_routing_to_warm_up():
    with pytest.raises(ValidationError, match=r"routing_warmup is given, and attention\.kind dense has no routing"):
        attention(kind="dense", routing_warmup={"start": 1.0, "steps": 4})

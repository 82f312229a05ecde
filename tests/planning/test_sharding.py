"""Predictions for `engine: deepspeed`: ZeRO's shards and traffic, and only layouts that the engine runs."""

from dataclasses import replace

import pytest

from dash_dist.planning import Assumptions, Machine
from dash_dist.planning.hardware import GPUS
from dash_dist.planning.layouts import Layout
from dash_dist.planning.parameters import StageNumbers
from dash_dist.planning.prediction import predict
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.search import layouts
from dash_dist.planning.sharding import Sharding
from tests.planning.planning_cases import large_config, small_config

EIGHT = Machine(GPUS["H100"], 8, 8, GPUS["H100"].memory * 2**30)


def zero(stage: int) -> dict[str, object]:
    return {"engine": "deepspeed", "deepspeed": {"zero_stage": stage}}


def test_only_layouts_that_the_engine_runs_are_looked_at() -> None:
    config = small_config(training={"sequence_length": 512, "global_batch_size": 8})
    changed = config.model_validate(config.model_dump() | zero(1))
    found = {(layout.tensor, layout.pipeline) for layout in layouts(changed, EIGHT)}
    assert found == {(1, 1)}
    assert {(layout.tensor, layout.pipeline) for layout in layouts(config, EIGHT)} > found


def test_every_stage_keeps_less_and_sends_as_it_reduces() -> None:
    config = large_config(parallel={"context": 8, "recompute": "full"})
    layout = Layout.of(config, 8)
    of_stages = [
        predict(config.model_validate(config.model_dump() | zero(stage)), layout, EIGHT, Assumptions(), vocab_size=1000)
        for stage in (1, 2, 3)
    ]
    one, two, three = (prediction.peak for prediction in of_stages)
    assert one.optimizer == two.optimizer == three.optimizer
    assert one.gradients > two.gradients == three.gradients
    assert one.weights == two.weights > three.weights
    sent = [prediction.sent["gradients"].nvlink for prediction in of_stages]
    # Bytes of a number: in a step 8, and 2 of gathered weights; 4 a micro-batch, and 2; 4 and twice 2 a micro-batch.
    micro_batches = config.training.global_batch_size
    assert sent[0] / sent[1] == pytest.approx((8 + 2) / (4 * micro_batches + 2), rel=1e-3)
    assert sent[2] / sent[1] == pytest.approx((4 + 4) * micro_batches / (4 * micro_batches + 2), rel=1e-3)


def test_megatron_shards_the_optimizer_where_it_is_asked_to() -> None:
    numbers, layout = StageNumbers(1000, 800), Layout(1, 4, 1, 1, "auto", Recompute())
    whole, sharded = (Sharding(optimizer=one).state(numbers, layout, largest_layer=0) for one in (False, True))
    assert (whole.numbers, whole.weights, whole.gradients, whole.optimizer) == (800, 2000, 3200, 9600)
    assert sharded == replace(whole, numbers=200, optimizer=2400)

"""Memory and time of the tiled MLP and of offload, and the advice that names them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dash_dist.config.run import RunConfig
from dash_dist.megatron.host_memory import BLOCK_BYTES
from dash_dist.megatron.host_moments import PIECE
from dash_dist.planning import Assumptions, Layout, Prediction, predict
from dash_dist.planning import offload as planned
from dash_dist.planning.activations import saved_by_layer, tile_bits
from dash_dist.planning.advice import memory_settings, recomputed_more, smallest_change, what_would_help
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.search import best_layouts
from dash_dist.planning.traffic import BF16, FP32, NO_EXCHANGE
from tests.planning.planning_cases import (
    MODEL,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    large_config,
    layout,
    machine,
    small_config,
)
from tests.support.ranks import run_ranks

TILE = 48
GIB = 2**30


def of_large(one: Layout, sequence_length: int = 2**19, gpu: str = "H200") -> Prediction:
    config = large_config(training={"steps": 2, "sequence_length": sequence_length, "global_batch_size": 1})
    return predict(config, one, machine(one.gpus, gpu=gpu), Assumptions(), vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("batch", [1, 2])
def test_activations_of_a_tiled_layer_are_what_autograd_keeps(batch: int) -> None:
    two, three = (
        run_ranks(
            "tests.planning.planning_jobs:saved_bytes",
            1,
            batch,
            SEQUENCE_LENGTH,
            layers,
            {"mlp_tile_tokens": TILE},
            cpu_only=True,
        )[0]
        for layers in (2, 3)
    )
    kept = sum(three[kind] - two[kind] for kind in three if kind != "bool")
    config = small_config(training={"micro_batch_size": batch}, parallel={"mlp_tile_tokens": TILE})
    one = Layout.of(config, 1)
    sizes = Sizes.of(config, one, vocab_size=VOCAB_SIZE)
    saved = saved_by_layer(sizes, "dash", NO_EXCHANGE, tiled=True).total
    norm = batch * SEQUENCE_LENGTH * MODEL.hidden_size * (2 * FP32 - BF16)  # not fused, as on a CPU
    assert saved - tile_bits(sizes) == kept - norm


def test_tiles_as_long_as_the_shard_change_nothing() -> None:
    plain = layout(recompute="full")
    assert of_large(replace(plain, mlp_tile_tokens=2**19)).peak == of_large(plain).peak


def test_a_tiled_mlp_is_no_longer_the_fullest_moment() -> None:
    plain = of_large(layout(recompute="full"))
    tiled = of_large(layout(recompute="full", mlp_tile_tokens=16384))
    assert plain.peak.moment == "backward of an MLP"
    assert tiled.peak.moment == "backward of an attention"
    assert plain.peak.activations - tiled.peak.activations > 2**19 * 14336 * BF16 * 4
    assert plain.seconds < tiled.seconds < 1.02 * plain.seconds
    assert tiled.flops == plain.flops


def test_without_recomputation_a_tiled_mlp_runs_once_more() -> None:
    plain, tiled = of_large(layout()), of_large(layout(mlp_tile_tokens=16384))
    assert tiled.flops - plain.flops == 32 * 2**19 * 2 * 2 * 4096 * 14336  # the second matrix only has gradients
    assert tiled.seconds > plain.seconds


def test_offloaded_inputs_leave_the_device_for_blocks_of_the_host() -> None:
    assert planned.BLOCK_BYTES == BLOCK_BYTES
    kept = of_large(layout(recompute="full", mlp_tile_tokens=16384))
    half, whole = (
        of_large(layout(recompute="full", mlp_tile_tokens=16384, offload_activations=share)) for share in (0.5, 1.0)
    )
    one = 2**19 * 4096 * BF16
    assert kept.peak.activations - half.peak.activations == (16 - 1) * one
    assert kept.peak.activations - whole.peak.activations == (31 - 1) * one
    assert (kept.peak.host, half.peak.host, whole.peak.host) == (0, 16 * one, 31 * one)
    assert whole.time.offload == 0.0  # half a million tokens take longer than the copies of their inputs
    assert whole.seconds == kept.seconds


def test_copies_that_take_longer_than_a_layer_are_waited_for() -> None:
    sizes = Sizes.of(large_config(), layout(), vocab_size=VOCAB_SIZE)
    one = layout(recompute="full", offload_activations=1.0)
    copy = 2**20 * 4096 * BF16 / 50e9
    assert planned.exposed_copies(sizes, one, 0, 4 * copy, 50e9) == 0.0
    assert planned.exposed_copies(sizes, one, 0, 2 * copy, 50e9) == pytest.approx(31 * copy / 2)
    assert planned.exposed_copies(sizes, replace(one, offload_activations=0.0), 0, 0.0, 50e9) == 0.0


def test_the_smallest_change_names_the_settings() -> None:
    config = large_config(
        training={"steps": 2, "sequence_length": 2**18, "global_batch_size": 8},
        model={
            "num_layers": 16,
            "hidden_size": 2048,
            "ffn_hidden_size": 8192,
            "num_attention_heads": 32,
            "num_kv_heads": 8,
        },
    )
    found = {
        memory: smallest_change(config, machine(8, memory), Assumptions(), layout(data=8), vocab_size=VOCAB_SIZE)
        for memory in (80.0, 50.0, 30.0, 20.0)
    }
    tile, offload = "parallel.mlp_tile_tokens=16384", "parallel.offload_activations=1.0"
    layers = "parallel.recompute_layers"
    assert found[80.0] == f"parallel.recompute=selective {layers}=14"
    assert found[50.0] == f"parallel.recompute=selective {layers}=11 {tile}"
    assert found[30.0] == f"parallel.recompute=selective {layers}=14 {tile} {offload}"
    assert found[20.0] == f"parallel.recompute=full {layers}=15 {tile} {offload}"  # the attention's output goes last


def test_what_the_engine_refuses_is_not_advised() -> None:
    megatron = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 1})
    engine: dict[str, Any] = {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}}
    config = RunConfig.model_validate(megatron.model_dump() | engine)
    asked = layout(recompute="full")
    change = smallest_change(config, machine(1, 90.0, gpu="H200"), Assumptions(), asked, vocab_size=VOCAB_SIZE)
    assert change is None or not {"mlp_tile_tokens", "offload_moments"} & set(change.replace("=", ".").split("."))


def test_tiles_do_the_work_of_a_recomputed_mlp() -> None:
    """With tensor parallelism it has an all-reduce, too."""
    ways = [Recompute(), Recompute("selective", ("mlp",))]
    found = [of_large(replace(layout(tensor=2, context=4, mlp_tile_tokens=16384), recompute=way)) for way in ways]
    assert found[0].time.tensor == found[1].time.tensor
    assert found[0].sent["tensor"] == found[1].sent["tensor"]
    assert found[0].time.matmul == pytest.approx(found[1].time.matmul)


def test_shards_of_the_stream_come_before_trades_of_time() -> None:
    config = large_config(
        training={"steps": 2, "sequence_length": 2**18, "global_batch_size": 1},
        parallel={"tensor": 8, "recompute": "full", "sequence_parallel": False},
    )
    asked = layout(tensor=8, recompute="full", sequence_parallel=False)
    shards, as_asked = (
        predict(config, replace(asked, sequence_parallel=split), machine(8), Assumptions(), vocab_size=VOCAB_SIZE)
        for split in (True, False)
    )
    assert shards.seconds < as_asked.seconds
    between = (shards.peak.total + as_asked.peak.total) / 2 / 2**30
    assert shards.peak.total < 0.6 * as_asked.peak.total
    change = smallest_change(config, machine(8, between), Assumptions(), asked, vocab_size=VOCAB_SIZE)
    assert change == "parallel.sequence_parallel=true"


def test_settings_that_are_there_are_not_advised_again() -> None:
    tiled, some = layout(recompute="full", mlp_tile_tokens=4096), layout(recompute="full", layers=3)
    assert memory_settings(tiled, 2**20) == [replace(tiled, offload_activations=1.0)]
    assert recomputed_more(tiled) == []
    assert recomputed_more(some) == [layout(recompute="full")]
    assert recomputed_more(layout(recompute="selective", layers=3)) == [layout(recompute="selective")]
    assert [str(one.recompute) for one in recomputed_more(layout())] == [
        "selective [projections]",
        "selective [mlp]",
        "selective",
    ]
    kept, full = layout(recompute="selective"), layout(recompute="full")
    assert memory_settings(layout(), 16384) == [
        replace(kept, offload_activations=1.0),
        full,
        replace(full, offload_activations=1.0),
    ]


def test_where_no_layout_fits_the_settings_with_which_one_does_are_named() -> None:
    config = large_config(training={"steps": 2, "sequence_length": 2**20, "global_batch_size": 1})
    few = machine(8, gpu="H200", memory_gib=75.0)
    best, looked_at = best_layouts(config, few, Assumptions(), vocab_size=VOCAB_SIZE)
    assert not best
    *_, line = what_would_help(config, few, Assumptions(), None, best, looked_at, vocab_size=VOCAB_SIZE)
    assert "These GPUs are enough with" in line
    assert "MLP tiles of 16384 tokens, offload 1" in line
    assert "of host memory a node" in line


def test_settings_of_parts_of_a_layer_do_not_hide_that_all_settings_fit() -> None:
    parallel = {"recompute": "selective", "recompute_modules": ("mlp",), "recompute_layers": 3}
    training = {"steps": 2, "sequence_length": 2**20, "global_batch_size": 1}
    config, few = large_config(training=training, parallel=parallel), machine(8, gpu="H200", memory_gib=75.0)
    best, looked_at = best_layouts(config, few, Assumptions(), vocab_size=VOCAB_SIZE)
    *_, line = what_would_help(config, few, Assumptions(), None, best, looked_at, vocab_size=VOCAB_SIZE)
    assert "These GPUs are enough with" in line


def test_moments_on_the_host_leave_the_device_and_are_copied_both_ways() -> None:
    assert planned.PIECE == PIECE

    def of(share: float) -> Prediction:
        config = large_config(optimizer={"lr": 1e-3, "offload_moments": share})
        return predict(config, layout(recompute="full"), machine(1), Assumptions(), vocab_size=VOCAB_SIZE)

    kept, half, whole = of(0.0), of(0.5), of(1.0)
    numbers = kept.peak.optimizer / 12
    assert half.peak.optimizer == pytest.approx(8 * numbers)
    assert whole.peak.optimizer == 4 * numbers
    assert whole.peak.host == 8 * numbers
    assert whole.time.offload == pytest.approx(16 * numbers / 50e9)
    assert half.time.offload == pytest.approx(whole.time.offload / 2)


def test_moments_are_advised_last() -> None:
    config = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 1})
    on = machine(1, 90.0, gpu="H200")
    asked = layout(recompute="full", mlp_tile_tokens=16384)
    change = smallest_change(config, on, Assumptions(), asked, vocab_size=VOCAB_SIZE)
    assert change == "parallel.recompute_layers=31 parallel.offload_activations=1.0 optimizer.offload_moments=1.0"
    best, looked_at = best_layouts(config, on, Assumptions(), vocab_size=VOCAB_SIZE)
    *_, line = what_would_help(config, on, Assumptions(), None, best, looked_at, vocab_size=VOCAB_SIZE)
    assert "offload 1 and optimizer.offload_moments=1.0: " in line

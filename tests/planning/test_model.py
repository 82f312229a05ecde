"""What the planner counts is what the real model holds and sends, on a CPU at several layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.selection import InfLLMv2Config
from dash_dist.engine.flops import flops_per_token
from dash_dist.planning import Layout, predict
from dash_dist.planning.activations import kept_by_layer, tile_bits
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.parameters import stage_numbers, stage_weights
from dash_dist.planning.recompute import WAYS, Recompute
from dash_dist.planning.traffic import BF16, FP32, NO_EXCHANGE
from dash_kernels.spec import AttentionSpec
from dash_kernels.triton.tiles import TileShape
from tests.planning.planning_cases import (
    CHUNK_SIZE,
    DENSE,
    MODEL,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    Case,
    machine,
    small_config,
)
from tests.support.ranks import run_ranks

ON_FOUR = [
    Case(),
    Case(tie_embeddings=True, distributed_optimizer=False),
    Case(tensor=2),
    Case(tensor=2, frozen=True),
    Case(tensor=2, lora=True),
    Case(pipeline=2, lora=True, distributed_optimizer=False),
    Case(pipeline=2, tie_embeddings=True, frozen=True, distributed_optimizer=False),
    Case(tensor=2, pipeline=2, tie_embeddings=True),
    Case(pipeline=2, context=2, tie_embeddings=True),
    Case(context=4),
    Case(context=4, exchange="allgather"),
    Case(context=4, exchange="ring"),
    Case(context=2, tensor=2, exchange="allgather"),
    Case(pipeline=2, tensor=2, nsa=True),
]


@pytest.fixture(scope="module")
def held() -> dict[Case, list[Any]]:
    """Case -> what each of four ranks holds."""
    by_rank = run_ranks("tests.planning.planning_jobs:held_by", 4, ON_FOUR, cpu_only=True)
    return {case: [of_rank[index] for of_rank in by_rank] for index, case in enumerate(ON_FOUR)}


def sizes_of(case: Case) -> tuple[Sizes, Layout]:
    layout = Layout.of(case.config(), 4)
    return Sizes.of(case.config(), layout, vocab_size=VOCAB_SIZE), layout


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_weights_are_those_of_the_model_in_order(held: dict[Case, list[Any]], case: Case) -> None:
    sizes, layout = sizes_of(case)
    for rank in held[case]:
        expected = stage_weights(
            sizes,
            pipeline=layout.pipeline,
            stage=rank.stage,
            tie_embeddings=case.tie_embeddings,
            lora=case.trainable.lora,
        )
        assert [(weight.name, weight.numbers) for weight in expected] == list(rank.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR, ids=str)
def test_buffers_and_optimizer_states_are_megatrons(held: dict[Case, list[Any]], case: Case) -> None:
    sizes, layout = sizes_of(case)
    totals: dict[int, dict[str, int]] = {}
    for rank in held[case]:
        numbers = stage_numbers(
            sizes,
            pipeline=layout.pipeline,
            stage=rank.stage,
            replicas=layout.weight_replicas,
            tie_embeddings=case.tie_embeddings,
            distributed_optimizer=case.distributed_optimizer,
            trainable=case.trainable,
        ).trained
        assert rank.gradients == numbers
        if case.distributed_optimizer:
            assert rank.buffer == numbers
        for name, states in rank.states.items():
            of_stage = totals.setdefault(rank.stage, {})
            of_stage[name] = of_stage.get(name, 0) + states
            # A rank's part is an equal share of the buffer, of which some may be padding.
            share = numbers // layout.weight_replicas if case.distributed_optimizer else numbers
            assert share - 64 * len(rank.weights) <= states <= share
    for stage, of_stage in totals.items():
        weights = stage_weights(
            sizes, pipeline=layout.pipeline, stage=stage, tie_embeddings=case.tie_embeddings, lora=case.trainable.lora
        )
        copies = layout.tensor if case.distributed_optimizer else layout.tensor * layout.weight_replicas
        expected = copies * sum(weight.numbers for weight in weights if case.trainable.trains(weight.name))
        assert of_stage == {"weights": expected, "exp_avg": expected, "exp_avg_sq": expected}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ON_FOUR if case.context > 1], ids=str)
def test_the_exchange_sends_what_is_predicted_where_every_chunk_is_selected(
    held: dict[Case, list[Any]], case: Case
) -> None:
    layout = Layout.of(case.config(), 4)
    prediction = predict(case.config(), layout, machine(4), DENSE, vocab_size=VOCAB_SIZE)
    sent = prediction.sent["exchange"]
    assert sent.network == 0
    # On a CPU K and V are float32, like their gradients; the planner counts bfloat16.
    ranks = layout.context
    found = [rank.sent for rank in held[case]]
    if case.exchange == "ring":
        wider = (3 * (ranks - 1) + ranks) * FP32 / (3 * (ranks - 1) * BF16 + ranks * FP32)
        assert max(found) == sent.nvlink * wider
    elif case.exchange == "allgather":
        assert max(found) == sent.nvlink * 3 * FP32 / (2 * BF16 + FP32)
    else:
        # Rank r of P holds pieces r and 2P - 1 - r of 2P. P - 1 ranks need the first, r the second, and the late one
        # needs all earlier ones. K and V are sent twice; what was received is sent home as gradients.
        sends, receives = [ranks - 1 + r for r in range(ranks)], [2 * ranks - 2 - r for r in range(ranks)]
        layers_and_heads = MODEL.num_layers * MODEL.num_kv_heads // (layout.pipeline * layout.tensor)
        piece = (
            2 * SEQUENCE_LENGTH // (2 * ranks) * MODEL.resolved_head_dim * layers_and_heads * 4
        )  # a step's sequences
        by_rank = [FP32 * piece * (2 * s + r) for s, r in zip(sends, receives, strict=True)]
        assert sorted(set(found)) == sorted(set(by_rank))
        assert sent.nvlink == (2 * BF16 + FP32) * piece * max(*sends, *receives)


DASH = AttentionConfig(chunk_size=CHUNK_SIZE)
NSA = AttentionConfig(chunk_size=CHUNK_SIZE, kind="nsa", top_chunks=4)


def kept_per_layer(batch: int, way: Recompute, attention: AttentionConfig, **parallel: Any) -> tuple[list[int], int]:
    """Bytes that autograd keeps of a layer at each rank, and as many as the planner counts."""
    job, ranks = "tests.planning.planning_jobs:saved_bytes", parallel.get("tensor", 1)
    two, three = (
        run_ranks(job, ranks, batch, SEQUENCE_LENGTH, layers, {**way.parallel, **parallel}, attention, cpu_only=True)
        for layers in (2, 3)
    )
    found = [
        sum(more[kind] - less[kind] for kind in more if kind != "bool")  # bool: the eager backend's selection
        for less, more in zip(two, three, strict=True)
    ]
    config = small_config(
        training={"micro_batch_size": batch}, attention=attention.model_dump(mode="json"), parallel=parallel
    )
    sizes = Sizes.of(config, Layout.of(config, ranks), vocab_size=VOCAB_SIZE)
    (kind,) = attention.pattern
    way = way if way.layers is None else Recompute()  # the layer that only three have is not the first
    # Not fused, as on a CPU, a norm keeps its input twice in float32 instead of once in bfloat16.
    norms = 2 - way.projections - way.mlp
    unfused = norms * sizes.stream_tokens * MODEL.hidden_size * (2 * FP32 - BF16)
    return found, kept_by_layer(sizes, kind, NO_EXCHANGE, way) - tile_bits(sizes) + unfused


@pytest.mark.parametrize(
    ("batch", "way", "attention"),
    [
        *((batch, way, DASH) for batch in (1, 2) for way in WAYS),
        *((1, way.of_layers(1), DASH) for way in WAYS[1:]),
        (2, Recompute(), AttentionConfig(chunk_size=CHUNK_SIZE, kind="topk", top_chunks=5)),
        (
            1,
            Recompute("selective"),
            AttentionConfig(
                chunk_size=32, kind="infllmv2", top_chunks=3, infllmv2=InfLLMv2Config(local_chunks=0, dense_length=0)
            ),
        ),
        (1, Recompute(), AttentionConfig(chunk_size=32, kind="infllmv2", top_chunks=34)),
        *((batch, way, NSA) for batch, way in ((1, Recompute()), (2, Recompute()), (2, Recompute("selective")))),
    ],
    ids=str,
)
def test_activations_of_a_layer_are_what_autograd_keeps(batch: int, way: Recompute, attention: AttentionConfig) -> None:
    found, counted = kept_per_layer(batch, way, attention)
    assert found == [counted]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_tensor_parallel_ranks_keep_shards_of_the_stream(way: Recompute) -> None:
    for sequence_parallel in (True, False):
        found, counted = kept_per_layer(2, way, DASH, tensor=2, sequence_parallel=sequence_parallel)
        assert found == [counted] * 2, sequence_parallel


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel_ranks_send_what_is_predicted(sequence_parallel: bool) -> None:
    job = "tests.planning.planning_jobs:tensor_bytes"
    two, three = (run_ranks(job, 2, layers, sequence_parallel, cpu_only=True) for layers in (2, 3))
    config = small_config(
        training={"global_batch_size": 1}, parallel={"tensor": 2, "sequence_parallel": sequence_parallel}
    )
    prediction = predict(config, Layout.of(config, 2), machine(2), DENSE, vocab_size=VOCAB_SIZE)
    for less, more in zip(two, three, strict=True):
        assert more - less == prediction.sent["tensor"].nvlink / MODEL.num_layers


def test_model_flops_are_those_of_the_runs_mfu() -> None:
    config = small_config()
    prediction = predict(config, Layout.of(config, 1), machine(1), DENSE, vocab_size=VOCAB_SIZE)
    per_token = flops_per_token(
        config.model, config.attention, vocab_size=VOCAB_SIZE, document_length=SEQUENCE_LENGTH, density=1.0
    )
    assert prediction.model_flops == per_token * 4 * SEQUENCE_LENGTH
    assert prediction.mfu == pytest.approx(prediction.model_flops / (prediction.seconds * 989e12))
    # Executed: the dense matrices three times, and attention without what causality leaves out of the own chunk.
    assert 0.9 * prediction.model_flops < prediction.flops < 1.6 * prediction.model_flops


def test_sizes_of_tiles_are_the_kernels() -> None:
    for heads, kv_heads, chunk in ((16, 4, 64), (16, 1, 64), (6, 2, 48), (8, 8, 128), (4, 2, CHUNK_SIZE)):
        config = small_config(
            model={"num_attention_heads": heads, "num_kv_heads": kv_heads}, attention={"chunk_size": chunk}
        )
        sizes = Sizes.of(config, Layout.of(config, 1), vocab_size=VOCAB_SIZE)
        spec = AttentionSpec(chunk_size=chunk, alpha=1.5, routing_scale=1.0, prior_sigma=None, softmax_scale=1.0)
        tile = TileShape.of(torch.empty(1, 8, heads, 16), kv_heads, spec)
        assert sizes.tile_tokens == tile.tokens

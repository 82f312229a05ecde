"""Predictions of models whose layers have several kinds of attention."""

from __future__ import annotations

from typing import Any

import pytest

from dash_dist.config.run import RunConfig
from dash_dist.config.selection import top_density
from dash_dist.context_parallel.halo import plan_halo
from dash_dist.planning import Assumptions, Prediction, predict
from dash_dist.planning.activations import attention_moment, saved_by_routing
from dash_dist.planning.layers import plan_layers
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.traffic import FP32, NO_EXCHANGE
from dash_kernels import ChunkGrid
from tests.planning.planning_cases import CHUNK_SIZE, SEQUENCE_LENGTH, large_config, layout, machine, small_config

WINDOW = 4096
KINDS: dict[str, dict[str, Any]] = {
    "dash": {"kind": "dash"},
    "dense": {"kind": "dense"},
    "window": {"kind": "window", "window": WINDOW},
    "three in four": {"kind": ["window", "window", "window", "dash"], "window": WINDOW},
}


def config(name: str, **attention: Any) -> RunConfig:
    return large_config(attention={"chunk_size": 64, **KINDS[name], **attention})


def predicted(name: str, **sizes: Any) -> Prediction:
    chosen = layout(**sizes)
    return predict(config(name), chosen, machine(chosen.gpus), Assumptions(), vocab_size=128_000)


@pytest.mark.parametrize("sizes", [{}, {"context": 8}, {"context": 8, "pipeline": 4, "recompute": "full"}])
def test_layers_add_up_by_their_kind(sizes: dict[str, Any]) -> None:
    of = {name: predicted(name, **sizes) for name in KINDS}
    for measure in ("attention", "exchange", "matmul"):
        seconds = {name: getattr(one.time, measure) for name, one in of.items()}
        mixed = 0.75 * seconds["window"] + 0.25 * seconds["dash"]
        assert seconds["three in four"] == pytest.approx(mixed), measure
    assert of["window"].seconds < of["three in four"].seconds < of["dash"].seconds < of["dense"].seconds
    assert of["window"].model_flops < of["three in four"].model_flops < of["dense"].model_flops
    assert of["window"].flops < of["three in four"].flops < of["dash"].flops < of["dense"].flops
    kept = {name: one.peak.activations for name, one in of.items()}
    assert kept["dash"] == kept["dense"]
    if not sizes:  # with a halo, K and V are copied
        assert kept["window"] < kept["three in four"] < kept["dash"]
    names = {name: one.exchange.name for name, one in of.items()}
    if sizes:
        assert names == {"dash": "selective", "dense": "selective", "window": "halo", "three in four": "selective"}
        assert of["window"].sent["summaries"].nvlink == of["window"].sent["summaries"].network == 0


def test_windows_take_no_more_than_the_sequence() -> None:
    longer = large_config(attention={"kind": "window", "window": 2**30})
    dense = predicted("dense", context=2)
    windows = predict(longer, layout(context=2), machine(2), Assumptions(), vocab_size=128_000)
    assert windows.model_flops == pytest.approx(dense.model_flops)
    assert windows.exchange.coverage == 1.0


@pytest.mark.parametrize("sequence_layout", ["contiguous", "zigzag", "double_zigzag"])
@pytest.mark.parametrize("window", [2, CHUNK_SIZE + 1])
def test_the_halo_is_that_of_the_busiest_rank(sequence_layout: str, window: int) -> None:
    attention = {"kind": "window", "window": window, "layout": sequence_layout}
    run = small_config(attention=attention, parallel={"context": 4})
    chosen = layout(context=4)
    sizes = Sizes.of(run, chosen, vocab_size=100)
    (plan, *_) = plan_layers(run, sizes, chosen, machine(4), Assumptions())
    sequence = ChunkGrid.whole_sequence(SEQUENCE_LENGTH, CHUNK_SIZE)
    halos = [plan_halo(sequence, rank, 4, sequence_layout, chunk_size=CHUNK_SIZE, window=window) for rank in range(4)]
    assert plan.exchange.received == max(sum(halo.receive) for halo in halos) * sizes.kv_heads


@pytest.mark.parametrize("count", [2, 5, 10**6])
@pytest.mark.parametrize("length", [CHUNK_SIZE // 2, CHUNK_SIZE, 7 * CHUNK_SIZE])
def test_the_density_of_a_fixed_number_of_chunks(count: int, length: int) -> None:
    available = range(1, -(-length // CHUNK_SIZE) + 1)
    wanted = sum(min(count, chunks) for chunks in available) / sum(available)
    assert top_density(count, length, CHUNK_SIZE) == pytest.approx(wanted)


def test_layers_that_take_the_top_chunks_are_planned_at_their_density() -> None:
    """Whatever density is assumed of layers that route."""
    count = 512
    run = large_config(attention={"chunk_size": 64, "kind": "topk", "top_chunks": count})
    exact = top_density(count, run.training.sequence_length, 64)
    found = [
        predict(run, layout(), machine(1), Assumptions(density=density), vocab_size=128_000) for density in (0.05, 0.9)
    ]
    assert found[0].time.attention == found[1].time.attention
    routed = predict(config("dash"), layout(), machine(1), Assumptions(density=exact), vocab_size=128_000)
    assert found[0].time.attention == pytest.approx(routed.time.attention)
    sizes = Sizes.of(run, layout(), vocab_size=128_000)
    lists = sizes.tokens * sizes.kv_heads * (count - 1) * 4
    assert lists < saved_by_routing(sizes, "topk") < 1.2 * lists


@pytest.mark.parametrize("sequence_layout", ["contiguous", "zigzag"])
def test_nsa_sends_its_halos_and_gathers_keys_and_values(sequence_layout: str) -> None:
    """Beside the exchange of topk: the window's halo, 16 tokens before each piece, and compressed keys and values."""
    chosen, plans = layout(context=4), {}
    for kind in ("topk", "nsa"):
        attention = {"kind": kind, "top_chunks": 5, "layout": sequence_layout}
        run = small_config(attention=attention | {"chunk_size": CHUNK_SIZE}, parallel={"context": 4})
        sizes = Sizes.of(run, chosen, vocab_size=100)
        plans[kind] = plan_layers(run, sizes, chosen, machine(4), Assumptions())[0]
    topk, nsa = plans["topk"].exchange, plans["nsa"].exchange
    sequence = ChunkGrid.whole_sequence(SEQUENCE_LENGTH, CHUNK_SIZE)
    reach = {window: 0 for window in (512, 17)}
    for window in reach:
        halos = [
            plan_halo(sequence, rank, 4, sequence_layout, chunk_size=CHUNK_SIZE, window=window) for rank in range(4)
        ]
        reach[window] = max(sum(halo.receive) for halo in halos) * CHUNK_SIZE
    halo_bytes = sum(reach.values()) * 2 * sizes.kv * 2
    assert nsa.forward.nvlink == pytest.approx(topk.forward.nvlink + halo_bytes)
    assert nsa.backward.nvlink == pytest.approx(topk.backward.nvlink + 2 * halo_bytes)
    vectors = 2 * SEQUENCE_LENGTH / 4 / 16 * sizes.kv  # compressed keys and values of a rank
    assert nsa.summaries.nvlink == 3 * vectors * 2
    assert nsa.summary_gradients.nvlink == 3 * vectors * 4
    assert plans["topk"].attended < plans["nsa"].attended


def test_a_pass_over_the_first_chunks_takes_time_and_memory_of_dash_layers() -> None:
    def of(name: str, **attention: Any) -> Prediction:
        chosen = layout()
        return predict(config(name, **attention), chosen, machine(chosen.gpus), Assumptions(), vocab_size=128_000)

    plain, first = of("dash"), of("dash", attend_first_chunk=True)
    mixed, mixed_first = (of("three in four", **more) for more in ({}, {"attend_first_chunk": True}))
    added = first.time.attention - plain.time.attention
    assert 0 < added < plain.time.attention
    assert mixed_first.time.attention - mixed.time.attention == pytest.approx(added / 4)
    sizes, with_pass = (
        Sizes.of(config("dash", **more), layout(), vocab_size=128_000) for more in ({}, {"attend_first_chunk": True})
    )
    moments = [attention_moment(one, "dash", NO_EXCHANGE).attention for one in (sizes, with_pass)]
    assert moments[1] - moments[0] > sizes.tokens * sizes.q * FP32
    assert attention_moment(with_pass, "dense", NO_EXCHANGE) == attention_moment(sizes, "dense", NO_EXCHANGE)
    assert first.model_flops == plain.model_flops

"""FP8 linears in a plan: operations, bytes of casts, memory, and GPUs that have none."""

from dataclasses import replace
from pathlib import Path

import pytest

from dash_dist.errors import ConfigError
from dash_dist.planning import Assumptions, predict
from dash_dist.planning.command import Options, run_plan
from dash_dist.planning.fp8 import cast_bytes
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.prediction import executed_products, fp8_products
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.step import fp8_matmul, layer_matmul
from tests.planning.planning_cases import large_config, layout, machine, small_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_products_but_those_of_weights_gradients_are_in_fp8() -> None:
    sizes = Sizes.of(small_config(), layout(), vocab_size=100)
    plain, whole = layout(fp8_linears=True), layout(recompute="full", fp8_linears=True)
    assert fp8_matmul(sizes, layout()) == fp8_products(sizes, layout()) == 0
    assert fp8_matmul(sizes, plain) == 2 * layer_matmul(sizes)
    layers, batches = sizes.layers, sizes.micro_batches
    again = executed_products(sizes, whole, fused=True) - executed_products(sizes, plain, fused=True)
    assert fp8_products(sizes, whole) == 2 * layer_matmul(sizes) * layers * batches + again


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("modules", [None, ("projections",), ("mlp",)])
@pytest.mark.parametrize("tile", [None, 100])
def test_bytes_of_casts_are_those_of_every_product(
    family: str, modules: tuple[str, ...] | None, tile: int | None
) -> None:
    config = small_config(model={"family": family, "qk_norm": family == "olmo2"})
    one = replace(layout(fp8_linears=True, mlp_tile_tokens=tile), recompute=Recompute("selective", modules))  # type: ignore[arg-type]
    sizes = Sizes.of(config, one, vocab_size=100)
    outputs = {"qkv": sizes.q + 2 * sizes.kv, "proj": sizes.hidden, "fc1": 2 * sizes.ffn, "fc2": sizes.hidden}
    inputs = {"qkv": sizes.hidden, "proj": sizes.q, "fc1": sizes.hidden, "fc2": sizes.ffn}
    norms_after, whole = family == "olmo2", modules is None
    again = {
        "qkv": whole or modules == ("projections",),
        "proj": whole or (modules == ("projections",) and norms_after),
        "fc1": whole or modules == ("mlp",) or tile is not None,
        "fc2": norms_after and (whole or modules == ("mlp",) or tile is not None),
    }
    expected = 0
    for name in outputs:
        tiles = 1 if tile is None or name in ("qkv", "proj") else -(-sizes.tokens // tile)
        weights = inputs[name] * outputs[name] * tiles
        expected += (1 + again[name]) * 3 * (sizes.tokens * inputs[name] + weights)
        expected += 3 * sizes.tokens * outputs[name] + 7 * weights
    assert cast_bytes(sizes, one) == expected
    assert cast_bytes(sizes, replace(one, fp8_linears=False)) == 0


def test_a_long_sequence_is_faster_and_takes_no_more_memory() -> None:
    config = large_config(training={"steps": 2, "sequence_length": 2**17, "global_batch_size": 1})
    plain, fp8 = (
        predict(config, layout(recompute="full", fp8_linears=on), machine(1), Assumptions(), vocab_size=128_000)
        for on in (False, True)
    )
    assert fp8.flops == plain.flops
    assert fp8.time.matmul < 0.8 * plain.time.matmul
    assert fp8.time.elementwise > plain.time.elementwise
    assert fp8.seconds < plain.seconds
    assert fp8.peak.total == plain.peak.total
    assert "FP8 linears" in str(fp8.layout)


def test_short_tiles_hold_the_transposed_weight() -> None:
    config = large_config(training={"steps": 2, "sequence_length": 2**14, "global_batch_size": 1})
    plain, fp8 = (
        predict(
            config,
            layout(recompute="full", mlp_tile_tokens=1024, fp8_linears=on),
            machine(1),
            Assumptions(),
            vocab_size=100,
        )
        for on in (False, True)
    )
    # 6 bytes per weight of the first matrix are held before its gradient, which takes 4.
    assert fp8.peak.activations - plain.peak.activations == 2 * 4096 * 14336


def test_gpus_without_fp8_are_refused() -> None:
    def plan(gpu: str) -> None:
        options = Options(gpu=gpu, gpus=8, vocab_size=320)
        run_plan(CONFIGS / "llama_1b_128k.yaml", ["parallel.fp8_linears=true"], options, json_path=None)

    with pytest.raises(ConfigError, match=r"an A100 has none: .*--gpu to one of H100, H200, B200"):
        plan("A100")
    plan("H100")

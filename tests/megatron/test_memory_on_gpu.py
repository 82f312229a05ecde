"""Tiled MLP and activation offload on a GPU: gradients are those without them, and the peak of memory is lower."""

from typing import Any

import pytest
import torch

from dash_dist.config.model import ModelConfig
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory and streams"),
]

TOKENS, LAYERS, HIDDEN, FFN, TILE = 65536, 8, 1024, 4096, 4096
MODEL = ModelConfig(
    num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=8, num_kv_heads=2, head_dim=128
)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiled": {"mlp_tile_tokens": TILE},
    "offloaded": {"offload_activations": 1.0},
    "both": {"mlp_tile_tokens": TILE, "offload_activations": 1.0},
}
RESIDUAL = 2 * TOKENS * HIDDEN  # bytes
OF_MLP = 2 * TOKENS * 5 * FFN


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    (found,) = run_ranks("tests.megatron.memory_jobs:steps_on_a_gpu", 1, MODEL, TOKENS, SETTINGS)
    result: dict[str, Any] = found
    return result


def test_offload_is_exact(measured: dict[str, Any]) -> None:
    for plain, offloaded in (("plain", "offloaded"), ("tiled", "both")):
        for first, second in zip(measured[plain]["losses"], measured[offloaded]["losses"], strict=True):
            assert first == second
        for name, gradient in measured[plain]["gradients"].items():
            assert torch.equal(measured[offloaded]["gradients"][name], gradient), name


def test_gradients_of_the_tiled_mlp_are_within_bfloat16(measured: dict[str, Any]) -> None:
    for name, gradient in measured["plain"]["gradients"].items():
        error = (measured["tiled"]["gradients"][name] - gradient).norm() / gradient.norm()
        # That of summary_query is a small sum of large terms of both signs.
        assert error < (5e-2 if name.endswith("summary_query") else 2e-2), f"{name}: {error:.1e}"


def test_the_peak_is_lower_by_what_is_not_held(measured: dict[str, Any]) -> None:
    peak = {name: one["peak"] for name, one in measured.items()}
    # A whole MLP holds its tensors and the gradients of two; a tile's are a sixteenth.
    assert peak["plain"] - peak["tiled"] > 0.8 * OF_MLP
    # Of the inputs that are kept, the last stays, one leaves, one comes back.
    assert peak["tiled"] - peak["both"] > (LAYERS - 4) * RESIDUAL
    assert measured["both"]["host"] >= (LAYERS - 1) * RESIDUAL

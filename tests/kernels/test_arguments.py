"""Bad calls are refused with the value given and what is allowed; calls beyond the kernels fall back and say so."""

import logging
from typing import Any

import pytest
import torch

from dash_kernels import backend, dash_attention, eager
from tests.kernels.attention_inputs import DEVICE, random_inputs

GOOD = {"chunk_size": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 24}, r"chunk_size is 24: give a multiple of 16 from 16 to 128"),
        ({"chunk_size": 256}, r"chunk_size is 256"),
        ({"chunk_size": 16.0}, r"chunk_size is 16.0"),
        ({"alpha": 1.0}, r"alpha is 1.0: give a number in \(1, 2\]"),
        ({"alpha": "1.5"}, r"alpha is '1.5'"),
        ({"alpha": 2.5}, r"alpha is 2.5"),
        ({"alpha": float("nan")}, r"alpha is nan"),
        ({"routing_scale": -1.0}, r"routing_scale is -1.0: give a positive number"),
        ({"prior_sigma": 0.0}, r"prior_sigma is 0.0: give None or a positive number"),
        ({"softmax_scale": float("inf")}, r"softmax_scale is inf"),
        ({"backend": "cuda"}, r"backend is 'cuda': give one of auto, triton, eager"),
        ({"backend": "triton", "alpha": 1.7}, r"cannot take this call: alpha is 1.7"),
    ],
)
def test_settings(change: dict[str, Any], message: str) -> None:
    inputs = random_inputs(40, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        dash_attention(inputs.q, inputs.k, inputs.v, inputs.summary_query, **(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(40, 8, 32)}, r"q has shape \(40, 8, 32\): give \[batch, tokens, heads, head_dim\]"),
        ({"k": torch.zeros(1, 41, 2, 32)}, r"k has shape \(1, 41, 2, 32\) but v \(1, 40, 2, 32\)"),
        ({"q": torch.zeros(1, 39, 8, 32)}, r"batch, tokens and head_dim must be equal"),
        ({"q": torch.zeros(1, 40, 7, 32)}, r"7 query heads are not a multiple of 2 KV heads"),
        ({"q": torch.zeros(1, 0, 8, 32)}, r"no dimension may be 0"),
        ({"summary_query": torch.zeros(8, 32)}, r"summary_query has shape \(8, 32\): give .* = \(2, 32\)"),
        ({"q": torch.zeros(1, 40, 8, 32, dtype=torch.int64)}, r"q has dtype torch.int64: give one of"),
        ({"v": torch.zeros(1, 40, 2, 32, dtype=torch.float64)}, r"they must be equal"),
        ({"v": torch.zeros(1, 40, 2, 32, device="meta")}, r"put all four on one device"),
    ],
)
def test_tensors(change: dict[str, torch.Tensor], message: str) -> None:
    inputs = random_inputs(40, dtype=torch.float32)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "summary_query": inputs.summary_query}
    change = {name: x if x.is_meta else x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        dash_attention(**(tensors | change), **GOOD)


def test_float64_is_refused_by_name_and_falls_back_by_default(caplog: pytest.LogCaptureFixture) -> None:
    inputs = random_inputs(40)
    with pytest.raises(ValueError, match="float64 is computed by the eager backend"):
        dash_attention(inputs.q, inputs.k, inputs.v, inputs.summary_query, **GOOD, backend="triton")
    spec = backend.AttentionSpec(16, 1.5, 1.0, None, 1.0)
    backend._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        chosen = [backend.select_backend("auto", inputs.q, inputs.k.shape[2], spec) for _ in range(2)]
    assert chosen == [eager, eager]
    assert len(caplog.records) == (1 if DEVICE == "cuda" else 0)  # without a GPU eager is the default: nothing to say

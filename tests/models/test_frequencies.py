"""Rotary frequencies and attention factors against those of transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dash_dist.models.frequencies import rotary_frequencies
from dash_dist.models.hugging_face import model_from

FACTORS = [1.0 + 0.1 * pair for pair in range(8)]
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 1.5,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.208,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": FACTORS,
        "long_factor": [3.0 * factor for factor in FACTORS],
    },
}
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
}


@pytest.mark.parametrize("length", [32, 256])
@pytest.mark.parametrize("name", ROPES)
def test_each_type_equals_that_of_transformers(name: str, length: int) -> None:
    rope = ROPES[name]
    model = model_from({"model_type": "llama", **SHAPE, "rope_scaling": rope})
    theirs = LlamaConfig(**{**SHAPE, "rope_parameters": rope | {"rope_theta": 5000.0}})
    wanted, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, seq_len=length)
    found = rotary_frequencies(16, model.rotary_base, model.positions, sequence_length=length)
    torch.testing.assert_close(found, wanted.double(), rtol=2e-6, atol=0)
    assert model.positions.resolved_attention_factor == pytest.approx(factor, rel=1e-12)


def test_dynamic_is_frozen_at_its_length() -> None:
    model = model_from({"model_type": "llama", **SHAPE, "rope_scaling": ROPES["dynamic"]})
    positions = model.positions.model_copy(update={"length": 1024})
    theirs = LlamaConfig(**{**SHAPE, "rope_parameters": ROPES["dynamic"] | {"rope_theta": 5000.0}})
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=1024)
    found = rotary_frequencies(16, model.rotary_base, positions, sequence_length=32)
    torch.testing.assert_close(found, wanted.double(), rtol=2e-6, atol=0)

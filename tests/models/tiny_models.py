"""Tiny random models of every family, made and saved by transformers itself."""

from pathlib import Path
from typing import Any

import torch

from dash_dist.config.attention import AttentionConfig, Kind
from tests.models.test_frequencies import ROPES

SEQUENCE_LENGTH = 128
VOCAB_SIZE = 50
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
WINDOW = 40  # longer than a piece of two ranks
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied, llama3": {"model_type": "llama", "tie_word_embeddings": True, "rope": "llama3"},
    "llama, linear": {"model_type": "llama", "rope": "linear"},
    "llama, longrope": {"model_type": "llama", "rope": "longrope"},
    "mistral, dynamic": {"model_type": "mistral", "sliding_window": None, "rope": "dynamic"},
    "qwen2, yarn": {"model_type": "qwen2", "rope": "yarn"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3, yarn, tied": {"model_type": "qwen3", "head_dim": 16, "rope": "yarn", "tie_word_embeddings": True},
    "qwen3, wide heads": {"model_type": "qwen3", "head_dim": 32},
    "smollm3": {"model_type": "smollm3"},
    "mistral, windows": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2, windows in the last layers": {"model_type": "qwen2", **SLIDING, "max_window_layers": 2},
    "qwen3, windows by layer": {
        "model_type": "qwen3",
        **SLIDING,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    },
    "smollm3, windows without positions": {"model_type": "smollm3", **SLIDING},
    "olmo2, yarn": {"model_type": "olmo2", "rope": "yarn"},
    "olmo3": {"model_type": "olmo3", "sliding_window": WINDOW},
    "olmo3, yarn in full layers, tied": {
        "model_type": "olmo3",
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope": "yarn, attention factor",
        "tie_word_embeddings": True,
    },
}
KINDS: dict[str, tuple[Kind, ...]] = {
    "mistral, windows": ("window",),
    "qwen2, windows in the last layers": ("dense", "dense", "window", "window"),
    "qwen3, windows by layer": ("window", "dense", "window", "window"),
    "smollm3, windows without positions": ("dense", "dense", "dense", "window"),
    "olmo3": ("window", "window", "window", "dense"),
    "olmo3, yarn in full layers, tied": ("dense", "window", "window", "dense"),
    "llama, mixed": ("window", "dash", "dense", "window"),
    "qwen3, mixed": ("window", "dash", "dense", "window"),
}
"""Of models with windows; those of `CASES` have dense attention in the other layers."""


def attention_of_case(name: str) -> AttentionConfig:
    """The attention that transformers computes in a model of `CASES`."""
    kinds = KINDS.get(name, ("dense",))
    return AttentionConfig(
        kind=kinds[0] if len(kinds) == 1 else kinds, window=WINDOW if "window" in kinds else None, chunk_size=16
    )


def save_tiny_model(name: str, folder: Path) -> torch.Tensor:
    """Save a random model with non-zero biases and norms to `folder`; return its logits of `tokens`, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    settings |= SHAPE | CASES[name]
    rope = settings.pop("rope", None)
    theta = {"rope_theta": 5000.0}
    settings["rope_parameters"] = theta | (ROPES[rope] if rope else {"rope_type": "default"})
    if settings["model_type"] == "olmo3":
        settings["rope_parameters"] = {
            "full_attention": settings["rope_parameters"],
            "sliding_attention": theta | {"rope_type": "default"},
        }
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB" if "tied" in name else "5GB")
    return logits_in_transformers(folder)


def logits_in_transformers(folder: Path) -> torch.Tensor:
    """Logits [1, T, vocab] of `tokens` by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = model(tokens()).logits
    return logits


def tokens() -> torch.Tensor:
    """Return token ids [1, SEQUENCE_LENGTH]."""
    return torch.randint(VOCAB_SIZE, (1, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(3))

"""Tiny random models of transformers with DashAttention, and the reference that computes their attention.

Knows configurations of transformers; does not know how dash_dist.hf computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dash_dist.hf  # noqa: F401  (registers dash_attention)
from dash_kernels import reference_dash_attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHUNK = 16
SETTINGS: dict[str, Any] = {"chunk_size": CHUNK, "alpha": 1.5, "routing_scale": 6.0, "prior_sigma": None}
VOCAB = 50


def tiny_config(family: str = "llama", settings: dict[str, Any] | None = SETTINGS, **others: Any) -> Any:
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({"sliding_window": None} if family == "mistral" else {}),
        **({} if settings is None else {"dash_attention": dict(settings)}),
        **others,
    }
    return AutoConfig.for_model(family, **config)


def tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model in evaluation mode whose logits depend on every weight."""
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **config), attn_implementation="dash_attention", dtype=dtype
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        std = 1.0 if name.endswith("summary_query") else 0.15
        if parameter.dim() > 1:
            parameter.data.normal_(std=std, generator=generator)
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def reference_forward(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, scaling: float, **__: Any
) -> tuple[torch.Tensor, None]:
    """The float64 reference in the place of `attention_forward`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    settings = module.config.dash_attention
    return reference_dash_attention(q, k, v, module.summary_query, softmax_scale=scaling, **settings)[0], None


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))

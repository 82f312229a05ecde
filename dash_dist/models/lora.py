"""The table of LoRA adapters: names in our model, in checkpoints and in `peft`, and their shapes.

Knows names, shapes and the merged weight. Does not know files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dash_dist.config.model import ModelConfig
from dash_dist.config.trainable import ADAPTERS, Linear, LoraConfig

BLOCKS: dict[Linear, tuple[str, str]] = {
    "q_proj": ("self_attention", "self_attn"),
    "k_proj": ("self_attention", "self_attn"),
    "v_proj": ("self_attention", "self_attn"),
    "o_proj": ("self_attention", "self_attn"),
    "gate_proj": ("mlp", "mlp"),
    "up_proj": ("mlp", "mlp"),
    "down_proj": ("mlp", "mlp"),
}
"""Block of each linear, in our model and in transformers."""
ROW_PARALLEL: frozenset[Linear] = frozenset({"o_proj", "down_proj"})
"""Linears whose inputs tensor parallelism cuts; it cuts the outputs of the others."""


def adapter_shapes(model: ModelConfig, linear: Linear) -> tuple[int, int]:
    """Return the (outputs, inputs) of a linear."""
    hidden, ffn, head_dim = model.hidden_size, model.ffn_hidden_size, model.resolved_head_dim
    q, kv = model.num_attention_heads * head_dim, model.num_kv_heads * head_dim
    shapes: dict[Linear, tuple[int, int]] = {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    return shapes[linear]


@dataclass(frozen=True)
class AdapterEntry:
    """Adapter of one linear of one layer.

    Attributes:
        layer: from 0.
        linear: its name in transformers.
    """

    layer: int
    linear: Linear

    @property
    def weight(self) -> str:
        """Name of the linear's weight in transformers."""
        return f"model.layers.{self.layer}.{BLOCKS[self.linear][1]}.{self.linear}.weight"

    def checkpoint_key(self, matrix: str) -> str:
        """Name of `a` or `b` in a distributed checkpoint, where those of all layers are stacked."""
        return f"decoder.layers.{BLOCKS[self.linear][0]}{ADAPTERS}{self.linear}.{matrix}"

    def peft_name(self, matrix: str) -> str:
        """Name of `a` or `b` in the files of `peft`."""
        return f"base_model.model.{self.weight.removesuffix('weight')}lora_{matrix.upper()}.weight"


def adapter_table(model: ModelConfig, lora: LoraConfig) -> Iterator[AdapterEntry]:
    """Yield the adapters of all layers."""
    for layer in range(model.num_layers):
        for linear in BLOCKS:
            if linear in lora.linears:
                yield AdapterEntry(layer, linear)


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the weight [out, in] with the adapter's product added in float32, in the weight's dtype."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def peft_config(lora: LoraConfig, base: str | None) -> dict[str, object]:
    """Return the content of `adapter_config.json`.

    Args:
        base: folder or name of the model under the adapters; None if the run began with random weights.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": list(lora.linears),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }

"""Difference between the logits of our model and of transformers, in float32.

Knows how both are built from one folder; does not know where the folder came from.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.megatron.model import build_model, transformer_config
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.models.safetensors_folder import SafetensorsFolder
from dash_dist.models.windows import attention_of

SMALL = 2 * 10**9
"""Parameters of a model that is compared whole."""
_FIRST_LAYERS = 4
"""Layers of a larger one that are compared, followed by its last norm and its output layer."""
_TOKENS = 64


def compared_layers(model: ModelConfig) -> int:
    """Return the layers that `measure_parity` compares."""
    kv, heads = model.num_kv_heads * model.resolved_head_dim, model.num_attention_heads * model.resolved_head_dim
    layer = model.hidden_size * (2 * heads + 2 * kv + 3 * model.ffn_hidden_size)
    vocabulary = (model.vocab_size or 0) * model.hidden_size
    whole = model.num_layers * layer + vocabulary * (1 if model.tie_embeddings else 2) <= SMALL
    return model.num_layers if whole else min(_FIRST_LAYERS, model.num_layers)


def measure_parity(model: ModelConfig, windows: list[int | None], folder: Path, weights: SafetensorsFolder) -> float:
    """Return |ours - theirs| / |theirs| of the logits of random tokens.

    Args:
        model: of the whole folder.
        windows: of each of its layers.
        folder: as transformers reads it.
        weights: of `folder`.
    """
    layers = compared_layers(model)
    length = min(_TOKENS, model.positions.limit or _TOKENS)
    tokens = torch.randint(model.vocab_size or 1, (1, length), generator=torch.Generator().manual_seed(0))
    without = tuple(layer for layer in model.layers_without_positions if layer < layers)
    first = model.model_copy(update={"num_layers": layers, "layers_without_positions": without})
    theirs = _theirs(folder, tokens, layers)
    ours = _ours(first, attention_of(windows[:layers], others="dense"), tokens, weights)
    return float((ours - theirs).norm() / theirs.norm())


def _theirs(folder: Path, tokens: torch.Tensor, layers: int) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:layers])
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens).logits
    return logits


def _ours(
    model: ModelConfig, attention: AttentionConfig, tokens: torch.Tensor, weights: SafetensorsFolder
) -> torch.Tensor:
    parallel = ParallelConfig()
    dims = ParallelDims.initialise(parallel, timeout=timedelta(minutes=10))
    try:
        config = transformer_config(model, parallel, dtype=torch.float32, device=dims.device)
        stage = build_model(
            config,
            model,
            attention,
            dims,
            vocab_size=model.vocab_size or 0,
            sequence_length=tokens.shape[1],
            seed=0,
            source=weights,
        )
        with torch.no_grad():
            logits: torch.Tensor = stage(tokens.to(dims.device), None, None)[..., : model.vocab_size]
        return logits.cpu()
    finally:
        dims.close()

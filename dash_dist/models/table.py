"""The table of parameters: each of our model's, and the tensors of Hugging Face that it is made of.

Read in one direction it imports, in the other it exports. Knows names, shapes and the order of rows. Does not know
files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dash_dist.config.model import ModelConfig, padded_vocab_size

SUMMARY_QUERY = "self_attention.core_attention.attention.summary_query"

Join = Callable[[list[torch.Tensor]], torch.Tensor]
Split = Callable[[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
        parameter: its name in the whole Megatron-core model, see `megatron.weights.global_name`.
        tensors: names of Hugging Face's, each with its shape.
        join: the parameter from these tensors.
        split: these tensors from the parameter; may return views.
        optional: a parameter without its tensors is zero.
    """

    parameter: str
    tensors: dict[str, tuple[int, ...]]
    join: Join
    split: Split
    optional: bool = False

    @property
    def checkpoint_key(self) -> tuple[str, int | None]:
        """Its key in a distributed checkpoint, and its layer, since those of all layers are stacked under one key."""
        first, *rest = self.parameter.split(".layers.")
        if not rest:
            return self.parameter, None
        layer, name = rest[0].split(".", 1)
        for ours, theirs in _NORMS.items():
            name = name.replace(ours, theirs)
        return f"{first}.layers.{name}", int(layer)


_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms before a projection: Megatron-core's checkpoints name them as parts of it."""


# Of attention and MLP: ours and theirs.
_NORMS_BEFORE = ("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm")
_NORMS_AFTER = (
    ("post_attention_layernorm", "post_attention_layernorm"),
    ("post_mlp_layernorm", "post_feedforward_layernorm"),
)


def parameter_table(model: ModelConfig, vocab_size: int) -> dict[str, Entry]:
    """Return every parameter of the model by its name, in the order of the layers.

    Args:
        vocab_size: tokens of the embedding; its padded rows follow them and are zero after an import.
    """
    return {entry.parameter: entry for entry in _entries(model, vocab_size)}


def _entries(model: ModelConfig, vocab_size: int) -> Iterator[Entry]:
    hidden = model.hidden_size
    yield _vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab_size, hidden)
    for layer in range(model.num_layers):
        yield from _layer(model, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    yield _same("decoder.final_layernorm.weight", "model.norm.weight", hidden)
    if not model.tie_embeddings:
        yield _vocabulary("output_layer.weight", "lm_head.weight", vocab_size, hidden)


def _layer(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, ffn, head_dim = model.hidden_size, model.ffn_hidden_size, model.resolved_head_dim
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    attention_norm, mlp_norm = _NORMS_AFTER if model.norms_after else _NORMS_BEFORE
    yield _same(f"{ours}{attention_norm[0]}.weight", f"{theirs}{attention_norm[1]}.weight", hidden)
    yield _qkv(model, f"{ours}self_attention.linear_qkv.weight", f"{theirs}self_attn.", "weight", (hidden,))
    if model.attention_bias:
        yield _qkv(model, f"{ours}self_attention.linear_qkv.bias", f"{theirs}self_attn.", "bias", ())
    if model.qk_norm:
        for name, number in {"q": heads, "k": kv_heads}.items():
            width = number * head_dim if model.qk_norm_over_heads else head_dim
            yield _same(f"{ours}self_attention.{name}_layernorm.weight", f"{theirs}self_attn.{name}_norm.weight", width)
    yield _same(
        f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight", hidden, heads * head_dim
    )
    yield _same(f"{ours}{SUMMARY_QUERY}", f"{theirs}self_attn.summary_query", kv_heads, head_dim, optional=True)
    yield _same(f"{ours}{mlp_norm[0]}.weight", f"{theirs}{mlp_norm[1]}.weight", hidden)
    yield Entry(
        f"{ours}mlp.linear_fc1.weight",
        {f"{theirs}mlp.gate_proj.weight": (ffn, hidden), f"{theirs}mlp.up_proj.weight": (ffn, hidden)},
        join=torch.cat,
        split=lambda weight: list(weight.chunk(2)),
    )
    yield _same(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", hidden, ffn)


def _same(ours: str, theirs: str, *shape: int, optional: bool = False) -> Entry:
    return Entry(ours, {theirs: shape}, join=lambda one: one[0], split=lambda one: [one], optional=optional)


def _vocabulary(ours: str, theirs: str, vocab_size: int, hidden: int) -> Entry:
    def pad(tensors: list[torch.Tensor]) -> torch.Tensor:
        missing = padded_vocab_size(vocab_size) - vocab_size
        return torch.cat([tensors[0], tensors[0].new_zeros(missing, hidden)]) if missing else tensors[0]

    return Entry(ours, {theirs: (vocab_size, hidden)}, join=pad, split=lambda weight: [weight[:vocab_size]])


def _qkv(model: ModelConfig, ours: str, theirs: str, kind: str, columns: tuple[int, ...]) -> Entry:
    """Megatron-core keeps the query heads, the key head and the value head of each KV head together."""
    kv_heads, head_dim = model.num_kv_heads, model.resolved_head_dim
    heads = {"q": model.num_attention_heads // kv_heads, "k": 1, "v": 1}  # of one KV head

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        groups = [tensor.view(kv_heads, -1, *columns) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(weight: torch.Tensor) -> list[torch.Tensor]:
        parts = weight.view(kv_heads, -1, *columns).split([number * head_dim for number in heads.values()], dim=1)
        return [part.flatten(0, 1) for part in parts]

    shapes = {f"{theirs}{name}_proj.{kind}": (kv_heads * number * head_dim, *columns) for name, number in heads.items()}
    return Entry(ours, shapes, join=join, split=split)

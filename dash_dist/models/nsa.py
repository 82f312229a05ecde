"""Parameters that layers of kind nsa have beside those of every layer: names and shapes in the whole model.

Knows the order of rows; does not know values. No model of Hugging Face has them.
"""

from __future__ import annotations

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_kernels.selection import BLOCK

BRANCHES = "self_attention.core_attention.branches"
COMPRESSION = "self_attention.core_attention.attention."


def nsa_layers(model: ModelConfig, attention: AttentionConfig) -> list[int]:
    """Return the layers of kind nsa, from 0."""
    return [layer for layer, kind in enumerate(attention.kinds(model.num_layers)) if kind == "nsa"]


def nsa_parameters(model: ModelConfig, attention: AttentionConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every such parameter by its name, see `megatron.weights.global_name`."""
    shapes = nsa_shapes(
        hidden=model.hidden_size,
        query_heads=model.num_attention_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.resolved_head_dim,
        bias=model.attention_bias,
    )
    return {
        f"decoder.layers.{layer}.{name}": shape
        for layer in nsa_layers(model, attention)
        for name, shape in shapes.items()
    }


def nsa_shapes(
    *, hidden: int, query_heads: int, kv_heads: int, head_dim: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's, of the heads given, in the model's order; all are cut along the heads.

    Rows of `keys_and_values` are, for each KV head, the key and the value of the compressed branch, then those of the
    window branch; rows of `gates` are, for each query head, those of the compressed, selected and window branch.
    """
    rows = kv_heads * 4 * head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    of_compression = {
        "positions": (BLOCK, head_dim),
        "inner": (BLOCK * head_dim, head_dim),
        "outer": (head_dim, head_dim),
    }
    for weight, shape in of_compression.items():
        for of in ("key", "value"):
            shapes[f"{COMPRESSION}{of}_{weight}"] = kv_heads, *shape
    shapes[f"{BRANCHES}.keys_and_values"] = rows, hidden
    shapes[f"{BRANCHES}.gates"] = query_heads * 3, hidden
    if bias:
        shapes[f"{BRANCHES}.bias"] = (rows,)
    return shapes

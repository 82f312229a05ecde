"""Floating-point operations of a training step, for model FLOPs utilisation.

Knows the model's shapes. Does not know what any kernel really executes.
"""

from __future__ import annotations

import math

from dash_dist.config.attention import AttentionConfig, Kind
from dash_dist.config.model import ModelConfig
from dash_dist.models.nsa import COMPRESSION, nsa_layers, nsa_shapes
from dash_kernels.selection import STRIDE


def flops_per_token(
    model: ModelConfig,
    attention: AttentionConfig,
    *,
    vocab_size: int,
    document_length: float,
    density: float = 1.0,
) -> float:
    """Forward and backward operations per token; a multiply-add counts as two, the backward as twice the forward.

    Per token: 6 per weight of every matrix (recomputed activations, norms and the embedding look-up count nothing),
    plus per layer, with H = num_attention_heads x head_dim and T = document_length, 12 H x the tokens that a token
    attends to on average, for scores and weighted values:

    - dash: density x (T - chunk_size) / 2 + chunk_size / 2, half of the earlier tokens, of which `density` are in
      selected chunks, and half of the own chunk; and routing, 6 H x T / (2 chunk_size), the query against the
      summaries of the earlier chunks;
    - topk: likewise, of the density that attention.top_chunks makes, where routing has no backward pass, 2 H x T /
      (2 chunk_size); infllmv2: 2 H x T / (2 x 16), against means every 16 tokens, unless the documents are dense;
    - nsa: the sum of its branches: topk's without routing, a window, and T / (2 x 16) compressed blocks; and 6 per
      weight of its own matrices, those of the compression once for every 16 tokens;
    - dense: T / 2;
    - window: window - window^2 / 2T, or T / 2 where the window is longer than T.

    Args:
        vocab_size: tokens of the tokenizer.
        document_length: tokens of a whole sequence; where documents are packed into it, those of the document that a
            token is in, on average over the tokens.
        density: selected / causally available chunks of the dash layers; 1.0 counts full causal attention.
    """
    heads = model.num_attention_heads * model.resolved_head_dim
    kv_heads = model.num_kv_heads * model.resolved_head_dim
    chunk = min(attention.chunk_size, document_length)
    weights_per_layer = model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.ffn_hidden_size)
    weights = model.num_layers * weights_per_layer + model.hidden_size * vocab_size

    def windowed(window: float) -> float:
        reached = min(window, document_length)
        return 12 * (reached - reached**2 / (2 * document_length))

    def selected(kind: Kind) -> float:
        available = (document_length / chunk + 1) / 2
        earlier = attention.fixed_density(kind, document_length) * available - 1  # chunks besides the own one
        return 12 * (earlier * chunk + chunk / 2)

    def listed(kind: Kind, stride: float) -> float:
        routed = attention.fixed_density(kind, document_length) < 1.0
        return selected(kind) + (2 * document_length / (2 * stride) if routed else 0.0)

    def branches() -> float:
        return selected("nsa") + windowed(attention.nsa_rule.window) + 12 * document_length / (2 * STRIDE)

    kinds = attention.kinds(model.num_layers)
    nsa = nsa_layers(model, attention)
    operations = {
        "dash": 12 * (density * (document_length - chunk) / 2 + chunk / 2) + 6 * document_length / (2 * chunk),
        "topk": listed("topk", chunk) if "topk" in kinds else 0.0,
        "infllmv2": listed("infllmv2", STRIDE) if "infllmv2" in kinds else 0.0,
        "nsa": branches() if nsa else 0.0,
        "dense": 12 * document_length / 2,
        "window": windowed(attention.window or document_length),
    }
    return 6.0 * (weights + len(nsa) * _weights_of_nsa(model)) + heads * sum(operations[kind] for kind in kinds)


def _weights_of_nsa(model: ModelConfig) -> float:
    """Weights that a token passes in an nsa layer alone."""
    shapes = nsa_shapes(
        hidden=model.hidden_size,
        query_heads=model.num_attention_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.resolved_head_dim,
        bias=False,
    )
    return sum(
        math.prod(shape) / (STRIDE if name.startswith(COMPRESSION) else 1)
        for name, shape in shapes.items()
        if not name.endswith("positions")
    )

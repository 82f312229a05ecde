"""Sizes of the models that benchmarks and the study make.

Knows sizes; does not know runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with one embedding for input and output."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int

    def section(self) -> dict[str, Any]:
        """The section `model` of a configuration, with random weights."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "tie_embeddings": True,
        }


SHAPES = {
    "1b": Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64),
    "8b": Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128),
    # Of tests of the benchmark.
    "tiny": Shape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16),
}

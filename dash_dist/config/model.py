"""The section `model:`, the shape of the decoder.

Knows the allowed shapes; does not know the distribution over ranks.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dash_dist.config.section import Section, divisors, next_multiple


class ModelConfig(Section):
    """A Llama-style decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases, no dropout."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int | None = Field(
        default=None, gt=0, description="channels of a head; None: hidden_size / num_attention_heads"
    )
    rotary_base: float = Field(default=10_000.0, gt=1.0)
    norm_epsilon: float = Field(default=1e-5, gt=0.0)
    init_std: float = Field(
        default=0.02, gt=0.0, description="projections into the residual stream: divided by sqrt(2 num_layers)"
    )
    tie_embeddings: bool = False

    @property
    def resolved_head_dim(self) -> int:
        """Width of one attention head, in channels."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.num_kv_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_kv_heads {kv_heads}: "
                f"set num_kv_heads to one of {divisors(heads)}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}: "
                "change one of them or set head_dim"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(
                f"head_dim {self.resolved_head_dim} is odd, and rotary positions turn pairs of channels: "
                f"set head_dim to {self.resolved_head_dim + 1}"
            )
        return self


VOCAB_MULTIPLE = 64
"""The rows of the embedding are a multiple of this at every tensor-parallel size. Checkpoints and losses therefore do
not depend on that size."""


def padded_vocab_size(vocab_size: int) -> int:
    """Return the rows of the embedding and the output layer for a tokenizer of `vocab_size` tokens."""
    return next_multiple(vocab_size, VOCAB_MULTIPLE)


LOGITS_PER_PIECE = 2**26
"""Logits that exist at a time on one rank: 256 MiB in float32."""

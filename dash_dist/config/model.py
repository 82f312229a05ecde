"""The section `model:`, the shape of the decoder.

Knows the allowed shapes; does not know the distribution over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dash_dist.config.positions import PositionsConfig
from dash_dist.config.section import Section, divisors, next_multiple


@dataclass(frozen=True)
class Family:
    """Architecture in transformers, and the parts that a Llama does not have.

    Attributes:
        norms_after: norms follow attention and MLP instead of preceding them.
        qk_norm_over_heads: the norm of queries, and that of keys, is over all heads together.
        windows_unscaled: layers with windows have default positions, whatever `model.positions`.
    """

    architecture: str
    attention_bias: bool = False
    qk_norm: bool = False
    layers_without_positions: bool = False
    norms_after: bool = False
    qk_norm_over_heads: bool = False
    windows_unscaled: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", attention_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "smollm3": Family("SmolLM3ForCausalLM", layers_without_positions=True),
    "olmo2": Family("Olmo2ForCausalLM", qk_norm=True, norms_after=True, qk_norm_over_heads=True),
    "olmo3": Family("Olmo3ForCausalLM", qk_norm=True, norms_after=True, qk_norm_over_heads=True, windows_unscaled=True),
}
"""Families by `model_type` in transformers."""


class ModelConfig(Section):
    """A Llama-style decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no dropout.

    Biases, places of norms, norms of queries and keys, and layers without positions are those of `family`.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "olmo3"] = Field(
        default="llama", description="architecture of the export, as transformers names it"
    )
    weights: Path | None = Field(
        default=None, description="folder of a Hugging Face model that a new run starts from; None: random weights"
    )
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int | None = Field(
        default=None, gt=0, description="channels of a head; None: hidden_size / num_attention_heads"
    )
    vocab_size: int | None = Field(
        default=None, gt=0, description="tokens of the embedding; None: those of the tokenizer, which may have fewer"
    )
    attention_bias: bool = Field(default=False, description="biases of queries, keys and values")
    qk_norm: bool = Field(
        default=False, description="RMSNorm of queries and keys before the rotation, of each head; OLMo: of all heads"
    )
    hidden_act: Literal["silu"] = "silu"
    rotary_base: float = Field(default=10_000.0, gt=1.0)
    positions: PositionsConfig = Field(default_factory=PositionsConfig)
    layers_without_positions: tuple[int, ...] = Field(
        default=(), description="layers, from 0, whose queries and keys are not rotated"
    )
    norm_epsilon: float = Field(default=1e-5, gt=0.0)
    init_std: float = Field(
        default=0.02, gt=0.0, description="projections into the residual stream: divided by sqrt(2 num_layers)"
    )
    tie_embeddings: bool = False

    @property
    def resolved_head_dim(self) -> int:
        """Width of one attention head, in channels."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def norms_after(self) -> bool:
        """Norms follow attention and MLP, before the residual is added."""
        return FAMILIES[self.family].norms_after

    @property
    def qk_norm_over_heads(self) -> bool:
        """The norms of queries and of keys are over all heads together."""
        return FAMILIES[self.family].qk_norm_over_heads

    @property
    def windows_unscaled(self) -> bool:
        """Layers with windows have default positions, and the others have not."""
        return FAMILIES[self.family].windows_unscaled and self.positions.type != "default"

    def embedded_tokens(self, tokenizer_size: int) -> int:
        """The tokens of the embedding, padding excluded. Raises ValueError if the tokenizer has more."""
        if self.vocab_size is None:
            return tokenizer_size
        if tokenizer_size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer_size} tokens and model.vocab_size is {self.vocab_size}: set "
                "data.tokenizer to the tokenizer of the model, or raise model.vocab_size without model.weights"
            )
        return self.vocab_size

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_are_a_path(cls, weights: object) -> object:
        if not isinstance(weights, str):
            return weights
        if not weights or "\0" in weights or not weights.isprintable():
            raise ValueError("holds a character that no path has: name the folder of a model")
        return Path(weights)

    @model_validator(mode="after")
    def _family_has_the_parts(self) -> Self:
        family = FAMILIES[self.family]
        for part in ("attention_bias", "qk_norm"):
            given, needed = getattr(self, part), getattr(family, part)
            if given != needed:
                others = [name for name, one in FAMILIES.items() if getattr(one, part) == given]
                raise ValueError(
                    f"model.{part} is {str(given).lower()}, and model.family {self.family} has {part} "
                    f"{str(needed).lower()}: change it or set model.family to {' or '.join(others)}"
                )
        without = self.layers_without_positions
        if without and not family.layers_without_positions:
            raise ValueError(
                f"model.layers_without_positions is given, and model.family {self.family} rotates every layer: "
                "drop it or set model.family to smollm3"
            )
        if list(without) != sorted({layer for layer in without if 0 <= layer < self.num_layers}):
            raise ValueError(
                f"model.layers_without_positions {list(without)} are not ascending layers from 0 to "
                f"{self.num_layers - 1}: list each once"
            )
        return self

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
        self.positions.check_head_dim(self.resolved_head_dim)
        return self


VOCAB_MULTIPLE = 64
"""The rows of the embedding are a multiple of this at every tensor-parallel size. Checkpoints and losses therefore do
not depend on that size."""


def padded_vocab_size(vocab_size: int) -> int:
    """Return the rows of the embedding and the output layer for a tokenizer of `vocab_size` tokens."""
    return next_multiple(vocab_size, VOCAB_MULTIPLE)


LOGITS_PER_PIECE = 2**26
"""Logits that exist at a time on one rank: 256 MiB in float32."""

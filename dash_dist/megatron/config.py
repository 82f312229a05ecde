"""What a run's YAML says about the model, its attention, its parallelism and its optimizer.

Knows which values and combinations are possible. Does not import Megatron-core or torch.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Config):
    """A Llama-style decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases, no dropout."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int | None = Field(
        default=None, gt=0, description="None: hidden_size / num_attention_heads, see resolved_head_dim"
    )
    rotary_base: float = Field(default=10_000.0, gt=1.0)
    norm_epsilon: float = Field(default=1e-5, gt=0.0)
    init_std: float = Field(
        default=0.02, gt=0.0, description="the two projections into the residual stream: / sqrt(2 num_layers)"
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
                f"set num_kv_heads to one of {_divisors(heads)}"
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


class AttentionConfig(_Config):
    """DashAttention, as `dash_dist.DashAttention` takes it."""

    chunk_size: int = Field(default=64, ge=16, le=128, multiple_of=16, description="tokens")
    alpha: float = Field(default=1.5, gt=1.0, le=2.0)
    routing_scale: float = Field(default=1.0, gt=0.0)
    prior_sigma: float | None = Field(default=None, gt=0.0)
    backend: Literal["auto", "triton", "eager"] = "auto"
    layout: Literal["zigzag", "double_zigzag", "contiguous"] = Field(
        default="zigzag",
        description="which chunks a context-parallel rank holds; cp/imbalance says which balances best",
    )
    exchange: Literal["auto", "selective", "allgather", "ring"] = Field(
        default="auto", description="how K and V travel between context-parallel ranks; the result is the same"
    )
    ranks_per_node: int | None = Field(
        default=None,
        gt=0,
        description="consecutive context-parallel ranks with fast links between them; None: found by host name",
    )


class ParallelConfig(_Config):
    """How the model is spread over the ranks. The data-parallel size is what the world size leaves over."""

    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    context: int = Field(default=1, gt=0)
    distributed_optimizer: bool = Field(
        default=True, description="shard the optimizer's state over the data- and context-parallel ranks"
    )
    recompute: Literal["none", "full"] = Field(
        default="none",
        description="full: keep only each layer's input and recompute the rest in the backward pass",
    )

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that read different sequences.

        Raises:
            ValueError: `world_size` is not a multiple of tensor x pipeline x context.
        """
        model_ranks = self.tensor * self.pipeline * self.context
        if world_size % model_ranks:
            raise ValueError(
                f"world size {world_size} is not a multiple of tensor x pipeline x context = {self.tensor} x "
                f"{self.pipeline} x {self.context} = {model_ranks}: start "
                f"{_next_multiple(world_size, model_ranks)} processes or lower one of the three"
            )
        return world_size // model_ranks


class OptimizerConfig(_Config):
    """AdamW, a linear warmup to `lr`, then a cosine down to `min_lr` at the run's last step."""

    lr: float = Field(gt=0.0)
    min_lr: float = Field(default=0.0, ge=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0, description="not applied to norm weights nor to summary_query")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    grad_clip: float | None = Field(default=1.0, gt=0.0, description="largest global gradient norm; None: no clipping")
    warmup_steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}: lower min_lr")
        return self


def check_combination(
    model: ModelConfig,
    attention: AttentionConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    sequence_length: int,
) -> None:
    """Refuse combinations that no single part of the configuration can see.

    Args:
        world_size: processes of the run.
        sequence_length: tokens of one sequence, before it is split.

    Raises:
        ValueError: says the value and what to change.
    """
    parallel.data_parallel_size(world_size)
    if attention.backend == "triton" and attention.alpha != 1.5:
        raise ValueError(
            f"attention.backend=triton computes attention.alpha 1.5 only, not {attention.alpha}: "
            "set attention.backend to auto or eager, or attention.alpha to 1.5"
        )
    if attention.backend == "triton" and model.resolved_head_dim > MAX_TRITON_HEAD_DIM:
        raise ValueError(
            f"attention.backend=triton takes a head_dim of up to {MAX_TRITON_HEAD_DIM}, not "
            f"{model.resolved_head_dim}: set attention.backend to auto or eager, or lower model.head_dim"
        )
    if model.num_kv_heads % parallel.tensor:
        raise ValueError(
            f"num_kv_heads {model.num_kv_heads} is not a multiple of parallel.tensor {parallel.tensor}: set "
            f"parallel.tensor to one of {_divisors(model.num_kv_heads)}"
        )
    if model.ffn_hidden_size % parallel.tensor:
        raise ValueError(
            f"ffn_hidden_size {model.ffn_hidden_size} is not a multiple of parallel.tensor "
            f"{parallel.tensor}: set it to {_next_multiple(model.ffn_hidden_size, parallel.tensor)}"
        )
    if VOCAB_MULTIPLE % parallel.tensor:
        raise ValueError(
            f"parallel.tensor {parallel.tensor} does not divide {VOCAB_MULTIPLE}, the multiple the "
            f"vocabulary is padded to: set parallel.tensor to one of {_divisors(VOCAB_MULTIPLE)}"
        )
    if model.num_layers % parallel.pipeline:
        raise ValueError(
            f"num_layers {model.num_layers} is not a multiple of parallel.pipeline {parallel.pipeline}: set "
            f"parallel.pipeline to one of {_divisors(model.num_layers)}"
        )
    if attention.ranks_per_node is not None and parallel.context % attention.ranks_per_node:
        raise ValueError(
            f"attention.ranks_per_node {attention.ranks_per_node} does not divide parallel.context {parallel.context}: "
            f"set it to one of {_divisors(parallel.context)}, or to null to have the nodes found by host name"
        )
    pieces_per_rank = PIECES_PER_RANK[attention.layout]
    pieces = parallel.context * pieces_per_rank
    if parallel.context > 1 and sequence_length % (pieces * attention.chunk_size):
        factors = f"{f'{pieces_per_rank} x ' if pieces_per_rank > 1 else ''}cp x chunk_size"
        multiple = pieces * attention.chunk_size
        raise ValueError(
            f"sequence length {sequence_length} is not a multiple of {factors} = {multiple}: pad to "
            f"{_next_multiple(sequence_length, multiple)}"
        )


PIECES_PER_RANK = {"zigzag": 2, "double_zigzag": 4, "contiguous": 1}
"""That of `dash_dist.context_parallel.layout`, which cannot be imported here without torch."""

MAX_TRITON_HEAD_DIM = 256
"""That of `dash_kernels.backend`, which cannot be imported here without torch."""

VOCAB_MULTIPLE = 64
"""The embedding has this multiple of rows whatever the tensor-parallel size, so that checkpoints and losses do not
depend on it."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding and of the output layer for a tokenizer of `vocab_size` tokens."""
    return _next_multiple(vocab_size, VOCAB_MULTIPLE)


def _next_multiple(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _divisors(value: int) -> list[int]:
    """Those that anybody would choose, for messages."""
    return [candidate for candidate in range(1, min(value, 1024) + 1) if value % candidate == 0]

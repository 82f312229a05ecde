"""The small model of the layout tests, the ways to compute its steps, and its batches. Nothing of Megatron-core."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from dash_dist.megatron import ModelConfig

VOCAB_SIZE = 50
SEQUENCE_LENGTH = 128
CHUNK_SIZE = 16
ROUTING_SCALE = 8.0  # sharp enough to leave chunks out
SEQUENCES = 4
STEPS_BEFORE_SAVE = 2
STEPS_AFTER_LOAD = 3
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_kv_heads=2,
    init_std=0.2,  # large enough for every gradient to count
)


@dataclass(frozen=True)
class Case:
    """One way to compute the same step."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    micro_batch_size: int = 1
    tie_embeddings: bool = False
    distributed_optimizer: bool = False
    grad_clip: float | None = None
    recompute: Literal["none", "full"] = "none"
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    exchange: Literal["ring", "allgather"] = "ring"
    logits_per_piece: int | None = None


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor


@dataclass
class Measured:
    """One rank's part of a step."""

    ranks: dict[str, int]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    grad_norm: float = 0.0
    # name in the whole model -> (tensor, dimension cut over tensor parallelism or None)
    gradients: dict[str, tuple[torch.Tensor, int | None]] = field(default_factory=dict)
    weights: dict[str, tuple[torch.Tensor, int | None]] = field(default_factory=dict)
    density: list[float] = field(default_factory=list)
    selected: list[list[int]] = field(default_factory=list)


def global_batch(step: int) -> Batch:
    """[SEQUENCES, SEQUENCE_LENGTH]; what counts in the loss is uneven over sequences and over the sequence."""
    generator = torch.Generator().manual_seed(step)
    shape = (SEQUENCES, SEQUENCE_LENGTH)
    tokens = torch.randint(VOCAB_SIZE, shape, generator=generator)
    kept = torch.linspace(0.1, 1.0, SEQUENCE_LENGTH) * torch.tensor([1.0, 0.05, 0.6, 0.9])[:, None]
    return Batch(
        tokens=tokens,
        labels=torch.randint(VOCAB_SIZE, shape, generator=generator),
        loss_mask=torch.rand(shape, generator=generator) < kept,
    )

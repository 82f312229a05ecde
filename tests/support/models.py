"""Small model of the layout tests, its batches, and the ways to compute its steps.

Knows configurations and batches; does not know Megatron-core, which it never imports.
"""

import itertools
from dataclasses import dataclass, field
from typing import Literal

import torch

from dash_dist.config.attention import Kind
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import RecomputeModule
from dash_dist.config.selection import InfLLMv2Config, NSAConfig

VOCAB_SIZE = 50
SEQUENCE_LENGTH = 128
CHUNK_SIZE = 16
ROUTING_SCALE = 8.0  # sharp enough to leave chunks out
SEQUENCES = 4
DOCUMENTS = ((5, 37, 60), (128,), (70, 1, 30), (16, 16, 10, 20, 33))
"""Tokens of the documents in each packed sequence; padded to whole chunks, they fill it."""
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
    sequence_parallel: bool | None = None
    micro_batch_size: int = 2  # of packed sequences, 1
    tie_embeddings: bool = False
    distributed_optimizer: bool = False
    grad_clip: float | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[RecomputeModule, ...] | None = None
    recompute_layers: int | None = None
    mlp_tile_tokens: int | None = None
    fp8_linears: bool = False
    offload_activations: float = 0.0
    offload_moments: float = 0.0
    overlap_gradients: bool = False  # in buckets of a few weights
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    exchange: Literal["auto", "selective", "allgather", "ring"] = "auto"
    ranks_per_node: int | None = None
    routing_scale: float = ROUTING_SCALE
    attend_first_chunk: bool = False
    logits_per_piece: int | None = None
    fused_kernels: bool = True  # on a GPU
    family: Literal["llama", "qwen3", "olmo2"] = "llama"
    kind: Kind | tuple[Kind, ...] = "dash"
    window: int | None = None
    top_chunks: int | None = None
    infllmv2: InfLLMv2Config | None = None
    nsa: NSAConfig | None = None
    packed: bool = False  # documents of DOCUMENTS in each sequence

    @property
    def sequences_at_once(self) -> int:
        return 1 if self.packed else self.micro_batch_size


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


@dataclass
class Measured:
    """Measurements of a step at one rank."""

    ranks: dict[str, int]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    grad_norm: float = 0.0
    # name in the whole model -> (tensor, dimension cut over tensor parallelism or None)
    gradients: dict[str, tuple[torch.Tensor, int | None]] = field(default_factory=dict)
    weights: dict[str, tuple[torch.Tensor, int | None]] = field(default_factory=dict)
    density: list[float] = field(default_factory=list)
    selected: list[list[int]] = field(default_factory=list)
    maps: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # selected and available of each layer
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: float = 0.0


def global_batch(step: int) -> Batch:
    """Return a batch [SEQUENCES, SEQUENCE_LENGTH] whose loss mask is uneven over sequences and positions."""
    generator = torch.Generator().manual_seed(step)
    shape = (SEQUENCES, SEQUENCE_LENGTH)
    tokens = torch.randint(VOCAB_SIZE, shape, generator=generator)
    kept = torch.linspace(0.1, 1.0, SEQUENCE_LENGTH) * torch.tensor([1.0, 0.05, 0.6, 0.9])[:, None]
    return Batch(
        tokens=tokens,
        labels=torch.randint(VOCAB_SIZE, shape, generator=generator),
        loss_mask=torch.rand(shape, generator=generator) < kept,
    )


def packed_borders(sequence: int) -> list[int]:
    """Return the first positions of the documents in a packed sequence, and SEQUENCE_LENGTH."""
    chunks = (-(-length // CHUNK_SIZE) for length in DOCUMENTS[sequence])
    return [0, *(CHUNK_SIZE * end for end in itertools.accumulate(chunks))]


def packed_batch(step: int) -> list[Batch]:
    """Return the sequences of `global_batch` with their borders; padding does not count in the loss."""
    whole = global_batch(step)
    sequences = []
    for index, lengths in enumerate(DOCUMENTS):
        borders = packed_borders(index)
        is_token = torch.zeros(1, SEQUENCE_LENGTH, dtype=torch.bool)
        for start, length in zip(borders[:-1], lengths, strict=True):
            is_token[:, start : start + length] = True
        sequence = slice(index, index + 1)
        sequences.append(
            Batch(
                whole.tokens[sequence],
                whole.labels[sequence],
                whole.loss_mask[sequence] & is_token,
                torch.tensor(borders, dtype=torch.int32),
            )
        )
    return sequences


def packed_documents_alone(step: int) -> list[Batch]:
    """Return each document of `packed_batch` as a sequence of its own, [1, its length], without padding."""
    documents = []
    for index, batch in enumerate(packed_batch(step)):
        for start, length in zip(packed_borders(index)[:-1], DOCUMENTS[index], strict=True):
            part = slice(start, start + length)
            documents.append(Batch(batch.tokens[:, part], batch.labels[:, part], batch.loss_mask[:, part]))
    return documents

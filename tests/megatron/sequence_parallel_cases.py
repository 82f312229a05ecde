"""Steps of the tests of sequence parallelism, at odd sizes: the model, its batches, and what each step changes.

Knows configurations and batches; does not know Megatron-core, which it never imports.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dash_dist.config.model import ModelConfig
from tests.support.models import CHUNK_SIZE, VOCAB_SIZE, Batch, Case

SEQUENCES = 6
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=44,
    ffn_hidden_size=38,
    num_attention_heads=6,
    num_kv_heads=2,
    head_dim=10,
    init_std=0.2,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A step of `MODEL`. model, trainable: settings that differ."""

    case: Case
    length: int
    model: tuple[tuple[str, Any], ...] = ()
    trainable: tuple[tuple[str, Any], ...] = ()

    def alone(self) -> Run:
        """The same function in one process and one micro-batch, or as many as documents need."""
        case = dataclasses.replace(
            self.case,
            tensor=1,
            context=1,
            pipeline=1,
            sequence_parallel=None,
            micro_batch_size=1 if self.case.packed else SEQUENCES,
            recompute="none",
            recompute_modules=None,
            mlp_tile_tokens=None,
            offload_activations=0.0,
            overlap_gradients=False,
            distributed_optimizer=False,
            logits_per_piece=None,
        )
        return dataclasses.replace(self, case=case)


def batches(run: Run, seed: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """Micro-batches of a data-parallel rank; packed sequences have two or three documents each."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(VOCAB_SIZE, (SEQUENCES, run.length), generator=generator) for _ in range(2))
    counted = torch.rand(SEQUENCES, run.length, generator=generator) < torch.linspace(0.2, 1.0, run.length)
    found = []
    for rows in torch.arange(dp_rank, SEQUENCES, dp_size).split(run.case.sequences_at_once):
        borders = None
        if run.case.packed:
            first = CHUNK_SIZE * (1 + int(rows[0]) % 3)
            borders = torch.tensor([0, first, 5 * CHUNK_SIZE, run.length][int(rows[0]) % 2 :], dtype=torch.int32)
            borders[0] = 0
        found.append(Batch(tokens[rows], labels[rows], counted[rows], borders))
    return found

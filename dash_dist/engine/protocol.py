"""Interfaces of an engine: what a run asks of the model that it trains, and what the shared parts ask of that model.

Knows the calls of a step, a checkpoint and the telemetry. Does not know Megatron-core or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from dash_dist.engine.batch import MicroBatch
from dash_dist.engine.saveable import Saveable
from dash_dist.engine.telemetry import StepTelemetry


@dataclass(frozen=True)
class StepResult:
    """One step, the same at every rank.

    Attributes:
        loss: mean cross entropy over the `tokens` of the global batch, in nats.
        grad_norm: global norm of that mean's gradient, before clipping.
        learning_rate: of this step.
        tokens: tokens of the global batch that count in the loss, each counted once.
        skipped: the loss or the gradient norm was not finite, and weights and optimizer state were left as they were.
        curves: further measurements of the step, by the names of their curves.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    skipped: bool
    curves: Mapping[str, float] = field(default_factory=dict)


class BucketLoss(NamedTuple):
    """Loss of the tokens at the positions of one bucket, the same at every rank.

    Attributes:
        total: sum of the cross entropy, in nats.
        tokens: tokens that count in the loss, each counted once.
    """

    total: float
    tokens: int


MOST_POSITIONS = 256
"""Positions of a row whose next tokens can be asked for in one call: their logits are held at once."""


class Predictor(Protocol):
    """A model that continues texts."""

    @property
    def telemetry(self) -> StepTelemetry:
        """Measurements that are made on request."""
        ...

    def next_tokens(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the likeliest token after each of some positions. A collective: every rank calls it.

        Attention is causal, so a row may go on with padding. Data-parallel ranks share the rows out. Of several tokens
        that are equally likely, the one with the lowest id is taken. Weights, gradients, optimizer and step stay as
        they are, and the measurements of the last step are dropped. With `telemetry.record_routing`, those of the
        routing are of the last rows of this call.

        Args:
            tokens: [N, T] int64 on the CPU, N whole sequences, the same at every rank.
            positions: [N, P] int64 on the CPU, from 0, with P up to `MOST_POSITIONS`; an entry may repeat another.

        Returns:
            [N, P] int64 on the CPU, at every rank: the token that follows tokens[n, : positions[n, p] + 1].

        Raises:
            BatchError: at every rank: the rows or positions of some rank cannot be, or differ from those of another.
            ExchangeError: see `Engine.train_step`.
        """
        ...


class Engine(Saveable, Predictor, Protocol):
    """The model of one run with its optimizer. All methods but `flops_per_step` are collectives: every rank calls them.

    Attributes:
        step: steps done, skipped ones counted.
        optimizer_changes: in words, optimizer state that `load` did not find in the checkpoint.
    """

    step: int
    optimizer_changes: list[str]

    @property
    def model(self) -> torch.nn.Module:
        """This rank's part of the model."""
        ...

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch.

        Args:
            micro_batches: this data-parallel rank's; ranks of one data-parallel index pass the same ones.
                Whole sequences, [micro_batch_size, sequence_length]: the engine cuts them to this rank's shard.

        Returns:
            The step's numbers. A step whose loss or gradient norm is not finite changes no weight and no optimizer
            state at any rank, sets `skipped`, and counts as a step of the learning rate's schedule. The caller decides
            whether to continue.

        Raises:
            BatchError: at every rank: see `count_loss_tokens`.
            ExchangeError: a rank of this one's context-parallel group died or did not answer; names the step.
        """
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch], edges: Sequence[int]) -> tuple[BucketLoss, ...]:
        """Compute the losses of one batch and leave weights, gradients, optimizer and step as they are.

        The measurements of the last step are dropped: ask `telemetry` for them before.

        Args:
            micro_batches: as for `train_step`.
            edges: ascending ends of the buckets; the last one is the sequence length.

        Returns:
            For each bucket, the loss of the tokens at positions from the end of the bucket before it. Positions count
            from the beginning of the sequence, or of the document where documents are separate.

        Raises:
            BatchError, ExchangeError: see `train_step`.
        """
        ...

    def flops_per_step(self, tokens: int, *, document_length: float, density: float = 1.0) -> float:
        """Return the floating-point operations of a step on `tokens` tokens, over all ranks, padding excluded.

        See `flops_per_token`; a density of 1.0 counts attention as if it were full.
        """
        ...

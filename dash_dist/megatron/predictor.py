"""A run's model for forward passes alone: no gradients, no optimizer.

Knows the model and its next tokens. Does not know texts, nor which checkpoint to load.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from dash_dist.checkpoints.engine_state import EngineState
from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.engine.ranks import routed_attentions
from dash_dist.engine.telemetry import StepTelemetry
from dash_dist.megatron.loss import next_tokens_of_batch
from dash_dist.megatron.model import DashGPTModel
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.shard_batch import ShardBatch
from dash_dist.megatron.trained_model import TrainedModel

LoadWeights = Callable[[Path, DashGPTModel, ParallelDims, dict[str, Any]], EngineState]
"""Function that fills the model with the weights of an engine's checkpoint folder; a collective."""


class MegatronPredictor:
    """A run's model for forward passes alone: a `Predictor`. Every method is a collective: all ranks call it.

    Args:
        model, attention, parallel: the run's configuration; `model.weights` is not read.
        trainable: of the run; its adapters are parts of the model.
        others: as for `TrainedModel`.

    Raises:
        ValueError: see `TrainedModel`.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        parallel: ParallelConfig,
        *,
        trainable: TrainableSection,
        dims: ParallelDims,
        vocab_size: int,
        sequence_length: int,
    ) -> None:
        self._trained = TrainedModel(
            model.model_copy(update={"weights": None}),
            attention,
            parallel.model_copy(update={"recompute": "none", "recompute_layers": None, "offload_activations": 0.0}),
            trainable=trainable,
            dims=dims,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            seed=0,
        )
        self._trained.module.requires_grad_(False)
        self._step = 0

    @property
    def telemetry(self) -> StepTelemetry:
        """Measurements of a forward pass that are made on request; those of `set_sequence_length` start anew."""
        return self._trained.telemetry

    def load(self, directory: Path, load_weights: LoadWeights) -> list[str]:
        """Load the weights of a verified checkpoint, and name the settings that change their function.

        Args:
            directory: an engine's folder within the checkpoint, of any parallel layout.
            load_weights: of that engine.

        Raises:
            FileNotFoundError, OSError, ValueError: at every rank: see `load_weights`.
        """
        trained = self._trained
        saved = load_weights(directory, trained.module, trained.dims, trained.identity)
        self._step = saved.step
        return trained.changes_since(saved)

    def next_tokens(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Compute the likeliest next tokens, see `Predictor.next_tokens`."""
        forward = functools.partial(next_tokens_of_shards, self._trained.module, self._trained.sequence_length)
        return self._trained.next_tokens(tokens, positions, forward, step=self._step)

    def set_sequence_length(self, sequence_length: int) -> None:
        """Take sequences of another length from now on. Raises ValueError: see `check_combination`."""
        if sequence_length != self._trained.sequence_length:
            self._trained.set_sequence_length(sequence_length)

    def set_routing_scale(self, routing_scale: float) -> None:
        """Route with another scale from now on, in every layer that routes."""
        for _, attention in routed_attentions(self._trained.module):
            attention.spec = attention.spec.replaced(routing_scale=routing_scale)


def next_tokens_of_shards(model: torch.nn.Module, sequence_length: int, shards: list[ShardBatch]) -> list[torch.Tensor]:
    """Return `next_tokens_of_batch` of each shard at the last pipeline stage, nothing at the others.

    Args:
        model: this rank's stage, wrapped or not.
        sequence_length: tokens of a whole sequence.
    """
    found: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=next_tokens_of_batch,
        data_iterator=iter(shards),
        model=[model],
        num_microbatches=len(shards),
        seq_length=sequence_length,
        micro_batch_size=shards[0].tokens.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found

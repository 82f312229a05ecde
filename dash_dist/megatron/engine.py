"""Training by Megatron-core: its pipeline schedule, its gradient buffers and its optimizer.

Knows how gradients become updates. Does not know where batches come from, when to save, nor what a run logs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.engine.batch import MicroBatch
from dash_dist.engine.protocol import BucketLoss, StepResult
from dash_dist.engine.saveable import PendingSave
from dash_dist.megatron.checkpoint import load_checkpoint, prepare_save, start_save
from dash_dist.megatron.host_copies import HostCopies
from dash_dist.megatron.loss import bucket_losses_of_batch, loss_of_batch
from dash_dist.megatron.optimizer import Optimizer, wrap_model
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.predictor import next_tokens_of_shards
from dash_dist.megatron.shard_batch import ShardBatch
from dash_dist.megatron.trained_model import TrainedModel, describe_new_state


class MegatronEngine:
    """The model of one run with Megatron-core's optimizer: an `Engine`.

    Args:
        optimizer: the run's section.
        trainable: the run's section; None trains every parameter.
        total_steps: of the run; the learning rate's cosine ends there, unless `optimizer` has `decay_steps`.
        others: as for `TrainedModel`.

    Raises:
        ValueError: see `TrainedModel`.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        *,
        dims: ParallelDims,
        vocab_size: int,
        sequence_length: int,
        total_steps: int,
        seed: int = 0,
        trainable: TrainableSection | None = None,
    ) -> None:
        self._trained = TrainedModel(
            model,
            attention,
            parallel,
            dims=dims,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            seed=seed,
            trainable=trainable or TrainableSection(),
        )
        self._trained.identity["distributed_optimizer"] = parallel.distributed_optimizer
        self.step = 0
        self.optimizer_changes: list[str] = []
        self.dims = dims
        self.model = self._trained.module
        self.telemetry = self._trained.telemetry
        config = self._trained.config
        config.finalize_model_grads_func = self._reduce_gradients
        self._wrapped = wrap_model(config, parallel, self.model)
        self._optimizer = Optimizer(
            optimizer,
            parallel,
            self._wrapped,
            total_steps=total_steps,
            dtype=config.params_dtype,
            learning_rates=self._trained.learning_rates,
        )
        self._forward_backward = get_forward_backward_func()
        self._copies = HostCopies()

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch, see `Engine.train_step`."""
        loss, tokens = self._trained.loss_of_step(micro_batches, self._accumulate_gradients, step=self.step + 1)
        grad_norm, skipped = self._update_weights(loss)
        self.step += 1
        return StepResult(loss, grad_norm, self._optimizer.learning_rate, tokens, skipped, self._trained.curves())

    def evaluate(self, micro_batches: Sequence[MicroBatch], edges: Sequence[int]) -> tuple[BucketLoss, ...]:
        """Compute losses by position, see `Engine.evaluate`."""
        forward = functools.partial(self._bucket_losses, edges)
        return self._trained.evaluate(micro_batches, forward, step=self.step)

    def next_tokens(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Compute the likeliest next tokens, see `Engine.next_tokens`."""
        forward = functools.partial(next_tokens_of_shards, self._wrapped, self._trained.sequence_length)
        return self._trained.next_tokens(tokens, positions, forward, step=self.step)

    def flops_per_step(self, tokens: int, *, document_length: float, density: float = 1.0) -> float:
        """Return the floating-point operations of a step, see `Engine.flops_per_step`."""
        return self._trained.flops_per_step(tokens, document_length=document_length, density=density)

    def prepare_save(self) -> None:
        """Begin to allocate what a save in the background needs, see `Engine.prepare_save`."""
        prepare_save(self.model, self._optimizer, self.dims, self._copies)

    def start_save(self, directory: Path, *, background: bool) -> PendingSave:
        """Begin to write model, optimizer and step, see `Engine.start_save`."""
        state, copies = self._trained.state(self.step), self._copies if background else None
        return start_save(Path(directory), self.model, self._optimizer, self.dims, state, copies=copies)

    def load(self, directory: Path) -> list[str]:
        """Load a checkpoint, see `Engine.load`; `distributed_optimizer` must be that of the checkpoint, too."""
        saved, fresh = load_checkpoint(Path(directory), self.model, self._optimizer, self.dims, self._trained.identity)
        self.step = saved.step
        self.optimizer_changes = describe_new_state(fresh)
        return self._trained.changes_since(saved)

    def _reduce_gradients(self, *arguments: Any, **options: Any) -> None:
        with self.telemetry.timer.span("gradients"):
            finalize_model_grads(*arguments, **options)

    def _accumulate_gradients(self, shards: list[ShardBatch], tokens: int) -> float:
        """Leave the gradient of the mean over all tokens in the buffers; returns the summed loss of the global batch.

        Megatron-core counts the tokens itself.
        """
        self._wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._forward_backward(
            forward_step_func=loss_of_batch,
            data_iterator=iter(shards),
            model=[self._wrapped],
            num_microbatches=len(shards),
            seq_length=self._trained.sequence_length,
            micro_batch_size=shards[0].tokens.shape[0],
        )
        # Every tensor-parallel rank of the last stage holds the same losses: one of them reports.
        total = torch.zeros(1, dtype=torch.float64, device=self.dims.device)
        if self.dims.is_last_stage and self.dims.tp_rank == 0:
            total += torch.stack(losses).double().sum()
        dist.all_reduce(total)
        return float(total)

    def _bucket_losses(self, edges: Sequence[int], shards: list[ShardBatch]) -> torch.Tensor:
        losses = self._forward_backward(
            forward_step_func=functools.partial(bucket_losses_of_batch, edges),
            data_iterator=iter(shards),
            model=[self._wrapped],
            num_microbatches=len(shards),
            seq_length=self._trained.sequence_length,
            micro_batch_size=shards[0].tokens.shape[0],
            forward_only=True,
        )
        total = torch.zeros(len(edges), 2, dtype=torch.float64, device=self.dims.device)
        if self.dims.is_last_stage and self.dims.tp_rank == 0:
            total += torch.stack(losses).sum(dim=0)
        return total

    def _update_weights(self, loss: float) -> tuple[float, bool]:
        """Apply the gradients, unless loss or norm is not finite at any rank; returns the norm, and True if skipped."""
        with self.telemetry.timer.span("optimizer"):
            grad_norm = self._optimizer.prepare()
        finite = torch.tensor(
            [math.isfinite(loss) and math.isfinite(grad_norm)], dtype=torch.int32, device=self.dims.device
        )
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self._optimizer.set_step(self.step + 1)
        skipped = not finite.item()
        if not skipped:
            with self.telemetry.timer.span("optimizer"):
                self._optimizer.update(grad_norm)
        return grad_norm, skipped

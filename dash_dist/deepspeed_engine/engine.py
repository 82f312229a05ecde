"""Training by DeepSpeed's ZeRO, with the model of `dash_dist.megatron`.

Knows the model and ZeRO. Does not know where batches come from, when to save, nor what a run logs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.deepspeed import DeepSpeedSection, check_engine
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.deepspeed_engine.checkpoint import ZeroSave, load_checkpoint, prepare_save, start_save
from dash_dist.deepspeed_engine.zero import ZeroOptimizer
from dash_dist.engine.batch import MicroBatch
from dash_dist.engine.protocol import BucketLoss, StepResult
from dash_dist.megatron.host_copies import HostCopies
from dash_dist.megatron.loss import bucket_losses
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.shard_batch import ShardBatch
from dash_dist.megatron.trained_model import TrainedModel, describe_new_state


class DeepSpeedEngine:
    """The model of one run with ZeRO as its optimizer: an `Engine` that trains to the weights of `MegatronEngine`.

    Differs in what is sharded over the data- and context-parallel ranks, in the checkpoint's format, and in that a
    skipped step's gradient norm is infinite. Tensor- and pipeline-parallel sizes are 1.

    Args:
        parallel: `distributed_optimizer` is not read: the ZeRO stage says what is sharded.
        deepspeed: the run's section.
        others: as for `MegatronEngine`.

    Raises:
        ValueError: see `TrainedModel` and `check_engine`.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        *,
        deepspeed: DeepSpeedSection,
        dims: ParallelDims,
        vocab_size: int,
        sequence_length: int,
        total_steps: int,
        seed: int = 0,
        trainable: TrainableSection | None = None,
    ) -> None:
        check_engine(parallel, deepspeed)
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
        self.step = 0
        self.optimizer_changes: list[str] = []
        self.dims = dims
        self.model = self._trained.module
        self.telemetry = self._trained.telemetry
        self.model.to(self._trained.config.params_dtype)
        self._zero = ZeroOptimizer(
            self.model,
            optimizer,
            deepspeed.settings(),
            dims,
            total_steps=total_steps,
            learning_rates=self._trained.learning_rates,
        )
        self._copies = HostCopies()
        self._last_save: ZeroSave | None = None

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch, see `Engine.train_step`."""
        loss, tokens = self._trained.loss_of_step(micro_batches, self._accumulate_gradients, step=self.step + 1)
        self.step += 1
        self._zero.set_step(self.step)
        with self.telemetry.timer.span("optimizer"):
            grad_norm, skipped = self._zero.update()
        return StepResult(loss, grad_norm, self._zero.learning_rate, tokens, skipped, self._trained.curves())

    def evaluate(self, micro_batches: Sequence[MicroBatch], edges: Sequence[int]) -> tuple[BucketLoss, ...]:
        """Compute losses by position, see `Engine.evaluate`."""
        forward = functools.partial(self._bucket_losses, edges)
        return self._trained.evaluate(micro_batches, forward, step=self.step)

    def next_tokens(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Compute the likeliest next tokens, see `Engine.next_tokens`."""
        return self._trained.next_tokens(tokens, positions, self._next_tokens, step=self.step)

    def flops_per_step(self, tokens: int, *, document_length: float, density: float = 1.0) -> float:
        """Return the floating-point operations of a step, see `Engine.flops_per_step`."""
        return self._trained.flops_per_step(tokens, document_length=document_length, density=density)

    def prepare_save(self) -> None:
        """Begin to allocate what a save in the background needs, see `Engine.prepare_save`."""
        prepare_save(self.model, self._zero, self._copies)

    def start_save(self, directory: Path, *, background: bool) -> ZeroSave:
        """Begin to write model, optimizer and step, see `Engine.start_save`."""
        if self._last_save is not None and not self._last_save.done():
            self._copies = HostCopies()  # it was abandoned, and reads those that it has to the end
        state, copies = self._trained.state(self.step), self._copies if background else None
        self._last_save = start_save(Path(directory), self.model, self._zero, self.dims, state, copies=copies)
        return self._last_save

    def load(self, directory: Path) -> list[str]:
        """Load a checkpoint, written at this ZeRO stage and these parallel sizes or others; see `Engine.load`."""
        saved, fresh = load_checkpoint(Path(directory), self.model, self._zero, self.dims, self._trained.identity)
        self.step = saved.step
        self.optimizer_changes = describe_new_state(fresh)
        return self._trained.changes_since(saved)

    def _accumulate_gradients(self, shards: list[ShardBatch], tokens: int) -> float:
        total = torch.zeros(1, dtype=torch.float64, device=self.dims.device)
        for number, shard in enumerate(shards, start=1):
            with self.telemetry.timer.span("forward"):
                loss = self._zero.forward(
                    shard.tokens,
                    None,
                    None,
                    labels=shard.labels,
                    loss_mask=shard.loss_mask,
                    packed_seq_params=shard.documents,
                    last=number == len(shards),
                )
            total += loss.detach()
            with self.telemetry.timer.span("backward"):
                self._zero.backward(loss, weight=1.0 / tokens)
        dist.all_reduce(total)
        return float(total)

    def _next_tokens(self, shards: list[ShardBatch]) -> list[torch.Tensor]:
        return [
            self._zero.forward(
                shard.tokens, None, None, loss_mask=shard.loss_mask, packed_seq_params=shard.documents, last=False
            )
            for shard in shards
        ]

    def _bucket_losses(self, edges: Sequence[int], shards: list[ShardBatch]) -> torch.Tensor:
        total = torch.zeros(len(edges), 2, dtype=torch.float64, device=self.dims.device)
        for shard in shards:
            token_losses = self._zero.forward(
                shard.tokens, None, None, labels=shard.labels, packed_seq_params=shard.documents, last=False
            )
            total += bucket_losses(shard, token_losses, edges)
        return total

"""A model that trains with ZeRO: the interface of Megatron's engine, one call per step.

Knows the model and ZeRO. Does not know where batches come from, when to save, nor what a run logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dash_dist.config.deepspeed import DeepSpeedSection, check_engine
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.deepspeed_engine.checkpoint import ZeroSave, load_checkpoint, start_save
from dash_dist.deepspeed_engine.zero import ZeroOptimizer
from dash_dist.engine.batch import MicroBatch
from dash_dist.megatron.engine import Engine, StepResult
from dash_dist.megatron.loss import summed_loss


class DeepSpeedEngine(Engine):
    """The model of one run with ZeRO as its optimizer; trains to the same weights as `Engine`.

    Differs from it in what is sharded over the data- and context-parallel ranks, in the checkpoint's format, and in
    that a skipped step's gradient norm is infinite. Tensor- and pipeline-parallel sizes are 1.

    Args:
        parallel: `distributed_optimizer` is not read: the ZeRO stage says what is sharded.
        deepspeed: the run's section.
        others: as for `Engine`.

    Raises:
        ValueError: as `Engine`, or see `check_engine`.
    """

    def __init__(self, *, deepspeed: DeepSpeedSection, **others: Any) -> None:
        self._section = deepspeed
        super().__init__(**others)

    def _prepare_training(self, parallel: ParallelConfig, optimizer: OptimizerConfig, *, total_steps: int) -> None:
        check_engine(parallel, self._section)
        self._identity.pop("distributed_optimizer")
        self.model.to(self._config.params_dtype)
        self._zero = ZeroOptimizer(self.model, optimizer, self._section.settings(), self.dims, total_steps=total_steps)

    def _accumulate_gradients(self, micro_batches: Sequence[MicroBatch], tokens: int) -> float:
        shards = self._split(micro_batches)
        total = torch.zeros(1, dtype=torch.float64, device=self.dims.device)
        for number, shard in enumerate(shards, start=1):
            with self._timer.span("forward"):
                token_losses = self._zero.forward(
                    shard.tokens,
                    None,
                    None,
                    labels=shard.labels,
                    packed_seq_params=shard.documents,
                    last=number == len(shards),
                )
                loss = summed_loss(shard.loss_mask, token_losses)
            total += loss.detach()
            with self._timer.span("backward"):
                self._zero.backward(loss, weight=1.0 / tokens)
        dist.all_reduce(total)
        return float(total)

    def _update_weights(self, loss: float, tokens: int) -> StepResult:
        self._zero.set_step(self.step + 1)
        with self._timer.span("optimizer"):
            grad_norm, skipped = self._zero.update()
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self._zero.learning_rate,
            tokens=tokens,
            skipped=skipped,
        )

    def start_save(self, directory: Path, *, background: bool) -> ZeroSave:
        """Begin to write model, optimizer and step, as they are now.

        Args:
            directory: new or empty, on storage that all ranks share.
            background: return before the files are written; training may go on.

        Raises:
            OSError: at every rank: the directory cannot be created, or is not empty.
        """
        return start_save(Path(directory), self.model, self._zero, self.dims, self._state(), background=background)

    def load(self, directory: Path) -> list[str]:
        """Go on from a checkpoint, written at this ZeRO stage and these parallel sizes or others.

        The model's shape must be that of the checkpoint. The learning rate follows this run's configuration from the
        checkpoint's step on.

        Returns:
            In words, each setting by which the weights now compute another function than the one they were trained in.

        Raises:
            FileNotFoundError: there is no complete checkpoint in the directory.
            ValueError: it is of another engine or model, or damaged; names what differs.
        """
        run = load_checkpoint(Path(directory), self.model, self._zero, self.dims, self._identity)
        self.step = run.step
        return self._changes_since(run)

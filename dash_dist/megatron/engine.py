"""A model that trains: one call per step, whatever the parallel layout.

Knows the model, its optimizer, the pipeline schedule and the loss. Does not know where batches come from,
when to save, nor what a run logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from dash_dist.checkpoints.engine_state import EngineState
from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.engine.batch import MicroBatch, ShardBatch, count_loss_tokens, split_micro_batches
from dash_dist.engine.exchange_statistics import ExchangeStatistics, gather_traffic
from dash_dist.engine.flops import flops_per_token
from dash_dist.engine.pending import PendingSave
from dash_dist.engine.routing import LayerRouting, gather_routing, set_recording
from dash_dist.engine.selection_map import SelectionMap, SelectionRecorder, gather_selections
from dash_dist.engine.step_timer import StepTimer
from dash_dist.megatron.checkpoint import load_checkpoint, start_save
from dash_dist.megatron.loss import loss_of_batch
from dash_dist.megatron.model import DashGPTModel, build_model, transformer_config
from dash_dist.megatron.optimizer import Optimizer, wrap_model
from dash_dist.megatron.parallel import ParallelDims

__all__ = ["Engine", "MicroBatch", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """One step, the same at every rank.

    Attributes:
        loss: mean cross entropy over the `tokens` of the global batch, in nats.
        grad_norm: global norm of that mean's gradient, before clipping.
        learning_rate: of this step.
        tokens: tokens of the global batch that count in the loss, each counted once.
        skipped: the loss or the gradient norm was not finite, and weights and optimizer state were left as they were.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    skipped: bool


class Engine:
    """The model of one run with its optimizer. All methods but the flops are collectives: every rank calls them.

    Weights are bfloat16 on GPUs, with float32 gradients and optimizer state, and float32 on the CPU.

    Args:
        model, attention, parallel, optimizer: the run's configuration.
        dims: initialised with `parallel`.
        vocab_size: tokens of the tokenizer.
        sequence_length: tokens of a whole sequence.
        total_steps: of the run; the learning rate ends its cosine there.
        seed: of the initial weights, which do not depend on the layout.

    Raises:
        ValueError: the configuration is impossible (see `check_combination`), or not on this rank's device.
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
    ) -> None:
        check_combination(model, attention, parallel, world_size=dims.world_size, sequence_length=sequence_length)
        if attention.backend == "triton" and dims.device.type != "cuda":
            raise ValueError(
                f"attention.backend=triton needs a CUDA GPU, and rank {dims.rank} is on {dims.device}: "
                "set attention.backend to auto or eager"
            )
        self.dims = dims
        self.step = 0
        """Steps done, skipped ones counted."""
        self._model_config = model
        self._attention = attention
        self._vocab_size = vocab_size
        self._sequence_length = sequence_length
        self._identity = {
            **model.model_dump(exclude={"rotary_base", "norm_epsilon", "init_std"}),
            "head_dim": model.resolved_head_dim,
            "vocab_size": vocab_size,
            "distributed_optimizer": parallel.distributed_optimizer,
        }
        self._function = {
            **{f"model.{name}": getattr(model, name) for name in ("rotary_base", "norm_epsilon")},
            **{
                f"attention.{name}": getattr(attention, name)
                for name in ("chunk_size", "alpha", "routing_scale", "prior_sigma")
            },
        }
        dtype = torch.bfloat16 if dims.device.type == "cuda" else torch.float32
        self._config = transformer_config(model, parallel, dtype=dtype, device=dims.device)
        self.model: DashGPTModel = build_model(
            self._config,
            model,
            attention,
            dims,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            seed=seed,
        )
        self._record_routing = False
        self._timer = StepTimer(dims.device)
        self._record_seconds = False
        self._selections = SelectionRecorder(dict(self.model.attentions()), self._timer)
        self._prepare_training(parallel, optimizer, total_steps=total_steps)

    @property
    def record_routing(self) -> bool:
        """Keep each layer's routing of the last micro-batch, for `routing_statistics`. Set it alike at every rank."""
        return self._record_routing

    @record_routing.setter
    def record_routing(self, record: bool) -> None:
        self._record_routing = record
        set_recording(self.model, record)

    @property
    def record_seconds(self) -> bool:
        """Measure the parts of the steps to come, for `seconds_by_part`. Set it alike at every rank."""
        return self._record_seconds

    @record_seconds.setter
    def record_seconds(self, record: bool) -> None:
        self._record_seconds = record
        self._config.timers = self._timer if record else None

    @property
    def record_selections(self) -> Sequence[int]:
        """Layers, from 0, that count which chunks they select, for `selection_maps`; as costly as routing them twice.

        Set it alike at every rank, for the steps of interest.
        """
        return self._selections.layers

    @record_selections.setter
    def record_selections(self, layers: Sequence[int]) -> None:
        self._selections.layers = tuple(layers)

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch.

        Args:
            micro_batches: this data-parallel rank's; ranks of one data-parallel index pass the same ones.
                Whole sequences, [micro_batch_size, sequence_length]: they are cut to this rank's shard here.

        Returns:
            The step's numbers. A step whose loss or gradient norm is not finite changes no weight and no optimizer
            state at any rank, says `skipped`, and counts as a step of the learning rate's schedule: whether to go on
            is the caller's decision.

        Raises:
            BatchError: at every rank: see `count_loss_tokens`.
            ExchangeError: a rank of this one's context-parallel group died or did not answer; names the step.
        """
        self._forget_last_step()
        self._timer.begin(record=self._record_seconds)
        tokens = count_loss_tokens(
            micro_batches,
            self.dims,
            sequence_length=self._sequence_length,
            vocab_size=self._vocab_size,
            chunk_size=self._attention.chunk_size,
        )
        try:
            loss = self._accumulate_gradients(micro_batches, tokens) / tokens
        except ExchangeError as error:
            raise ExchangeError(f"step {self.step + 1}: {error}") from error
        result = self._update_weights(loss, tokens)
        self.step += 1
        return result

    def routing_statistics(self) -> list[LayerRouting]:
        """Every layer's routing in the last micro-batch of the last step, at every rank.

        Raises:
            RuntimeError: at every rank: `record_routing` was not set before that step.
        """
        num_chunks = math.ceil(self._sequence_length / self._attention.chunk_size)
        return gather_routing(self.model, self.dims, num_chunks=num_chunks)

    def selection_maps(self) -> list[SelectionMap]:
        """The layers of `record_selections` in the last micro-batch of the last step, at every rank.

        Raises:
            RuntimeError: at every rank: `record_selections` was not set before that step.
        """
        num_chunks = math.ceil(self._sequence_length / self._attention.chunk_size)
        return gather_selections(self._selections, self.dims, num_chunks=num_chunks)

    def seconds_by_part(self) -> dict[str, float]:
        """Return the seconds that this rank's device spent on each part of the last step. Local; waits for the device.

        Ask before `exchange_statistics`, which gives the waits for K and V away.

        Returns:
            Seconds: "forward" and "backward" (with recomputation) of all micro-batches, without what the attention
            waited for K and V, which is "exchange"; "gradients", their reduction over the ranks; "optimizer", the
            gradient norm and the update; and "heat_map", where selections were recorded. What a step takes beyond
            their sum is waiting, for other pipeline stages above all.

        Raises:
            RuntimeError: `record_seconds` was not set before that step.
        """
        seconds = self._timer.seconds()
        seconds["forward"] -= seconds.get("heat_map", 0.0)
        if self.dims.cp_size > 1:
            waited = [attention.traffic.waited() for _, attention in self.model.attentions()]
            in_forward, in_backward = (sum(part) for part in zip(*waited, strict=True))
            seconds["forward"] -= in_forward
            seconds["backward"] -= in_backward
            seconds["exchange"] = in_forward + in_backward
        return seconds

    def exchange_statistics(self) -> ExchangeStatistics | None:
        """Return the exchange statistics of the last step, at every rank; None without context parallelism.

        Waits for the device, and gives the counters away: ask once per step, after it, for the steps of interest. Every
        step starts its own count, so that the numbers of one that nobody asked for are lost.

        Raises:
            RuntimeError: at every rank: there was no step since the last call.
        """
        if self.dims.cp_size == 1:
            return None
        num_chunks = self._sequence_length // self._attention.chunk_size  # all complete, see `check_combination`
        return gather_traffic(self.model, self.dims, num_chunks=num_chunks, layout=self._attention.layout)

    def flops_per_step(self, tokens: int, *, document_length: float, density: float = 1.0) -> float:
        """Floating-point operations that a step on `tokens` tokens is worth, over all ranks; padding is worth none.

        See `flops_per_token`; 1.0 as the density counts attention as if it were full.
        """
        per_token = flops_per_token(
            self._model_config,
            self._attention,
            vocab_size=self._vocab_size,
            document_length=document_length,
            density=density,
        )
        return tokens * per_token

    def start_save(self, directory: Path, *, background: bool) -> PendingSave:
        """Begin to write model, optimizer and step as they are now; the next steps do not change what is written.

        Args:
            directory: new or empty, on storage that all ranks share.
            background: return as soon as training can go on; otherwise when this rank has written. Either way the
                checkpoint is complete when `finish` of what is returned has returned.

        Raises:
            OSError: at every rank: the directory cannot be created, or is not empty.
        """
        return start_save(Path(directory), self.model, self._optimizer, self.dims, self._state(), background=background)

    def load(self, directory: Path) -> list[str]:
        """Go on from a checkpoint, written at this layout or another.

        The model's shape and `distributed_optimizer` must be those of the checkpoint. The learning rate follows this
        run's configuration from the checkpoint's step on.

        Returns:
            In words, each setting by which the weights now compute another function than the one they were trained in.

        Raises:
            FileNotFoundError: there is no complete checkpoint in the directory.
            ValueError: it is of another model, and names what differs; or its inside is not what this model needs.
        """
        run = load_checkpoint(Path(directory), self.model, self._optimizer, self.dims, self._identity)
        self.step = run.step
        return self._changes_since(run)

    def _state(self) -> EngineState:
        return EngineState(
            step=self.step, sequence_length=self._sequence_length, identity=self._identity, function=self._function
        )

    def _changes_since(self, run: EngineState) -> list[str]:
        return [
            f"{name} was {run.function[name]} and is {value}"
            for name, value in self._function.items()
            if value != run.function[name]
        ]

    # What follows is Megatron-core's way to train; an engine that trains the same model in another way replaces it, and
    # `save` and `load`.

    def _prepare_training(self, parallel: ParallelConfig, optimizer: OptimizerConfig, *, total_steps: int) -> None:
        """Make what turns `self.model`'s losses into updates of its weights."""
        self._config.finalize_model_grads_func = self._reduce_gradients
        self._wrapped = wrap_model(self._config, parallel, self.model)
        self._optimizer = Optimizer(
            optimizer, parallel, self._wrapped, total_steps=total_steps, dtype=self._config.params_dtype
        )
        self._forward_backward = get_forward_backward_func()

    def _forget_last_step(self) -> None:
        """Counters that nobody asked for, and what the layers of a step that failed kept for their recomputation."""
        for _, attention in self.model.attentions():
            attention.traffic.clear()
            if attention.memory is not None:
                attention.memory.clear()

    def _reduce_gradients(self, *arguments: Any, **options: Any) -> None:
        with self._timer.span("gradients"):
            finalize_model_grads(*arguments, **options)

    def _split(self, micro_batches: Sequence[MicroBatch]) -> list[ShardBatch]:
        return split_micro_batches(
            micro_batches,
            self.dims,
            layout=self._attention.layout,
            sequence_length=self._sequence_length,
            chunk_size=self._attention.chunk_size,
        )

    def _accumulate_gradients(self, micro_batches: Sequence[MicroBatch], tokens: int) -> float:
        """Leave the gradient of the mean over `tokens` in the buffers, and return the summed loss of the global batch.

        Megatron-core counts the tokens itself.
        """
        shards = self._split(micro_batches)
        self._wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._forward_backward(
            forward_step_func=loss_of_batch,
            data_iterator=iter(shards),
            model=[self._wrapped],
            num_microbatches=len(shards),
            seq_length=self._sequence_length,
            micro_batch_size=shards[0].tokens.shape[0],
        )
        # Every tensor-parallel rank of the last stage holds the same losses: one of them reports.
        total = torch.zeros(1, dtype=torch.float64, device=self.dims.device)
        if self.dims.is_last_stage and self.dims.tp_rank == 0:
            total += torch.stack(losses).double().sum()
        dist.all_reduce(total)
        return float(total)

    def _update_weights(self, loss: float, tokens: int) -> StepResult:
        """Let the gradients change the weights, or skip the step."""
        with self._timer.span("optimizer"):
            grad_norm = self._optimizer.prepare()
        finite = torch.tensor(
            [math.isfinite(loss) and math.isfinite(grad_norm)], dtype=torch.int32, device=self.dims.device
        )
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self._optimizer.set_step(self.step + 1)
        result = StepResult(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self._optimizer.learning_rate,
            tokens=tokens,
            skipped=not finite.item(),
        )
        if not result.skipped:
            with self._timer.span("optimizer"):
                self._optimizer.update(grad_norm)
        return result

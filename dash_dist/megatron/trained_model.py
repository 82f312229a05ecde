"""The model of a run as every engine trains it: its settings, its batches and its telemetry.

Knows the model and the checks of a step. Does not know how gradients become updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dash_dist.checkpoints.engine_state import EngineState
from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.engine.batch import MicroBatch, count_loss_tokens
from dash_dist.engine.flops import flops_per_token
from dash_dist.engine.step_timer import StepTimer
from dash_dist.engine.telemetry import StepTelemetry
from dash_dist.megatron.model import DashGPTModel, build_model, transformer_config
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.shard_batch import ShardBatch, split_micro_batches


class TrainedModel:
    """The model of one run, for an engine that owns it.

    Weights are bfloat16 on GPUs, with float32 gradients and optimizer state, and float32 on the CPU.

    Args:
        model, attention, parallel: the run's configuration.
        dims: initialised with `parallel`.
        vocab_size: tokens of the tokenizer.
        sequence_length: tokens of a whole sequence.
        seed: of the initial weights, which do not depend on the layout.

    Raises:
        ValueError: the configuration is impossible (see `check_combination`), or not on this rank's device.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        parallel: ParallelConfig,
        *,
        dims: ParallelDims,
        vocab_size: int,
        sequence_length: int,
        seed: int,
    ) -> None:
        check_combination(model, attention, parallel, world_size=dims.world_size, sequence_length=sequence_length)
        if attention.backend == "triton" and dims.device.type != "cuda":
            raise ValueError(
                f"attention.backend=triton needs a CUDA GPU, and rank {dims.rank} is on {dims.device}: "
                "set attention.backend to auto or eager"
            )
        self.dims = dims
        self.sequence_length = sequence_length
        self._model_config = model
        self._attention = attention
        self._vocab_size = vocab_size
        self.identity = {
            **model.model_dump(exclude={"rotary_base", "norm_epsilon", "init_std"}),
            "head_dim": model.resolved_head_dim,
            "vocab_size": vocab_size,
        }
        """Settings that a checkpoint must share."""
        self._function = {
            **{f"model.{name}": getattr(model, name) for name in ("rotary_base", "norm_epsilon")},
            **{
                f"attention.{name}": getattr(attention, name)
                for name in ("chunk_size", "alpha", "routing_scale", "prior_sigma")
            },
        }
        dtype = torch.bfloat16 if dims.device.type == "cuda" else torch.float32
        self.config = transformer_config(model, parallel, dtype=dtype, device=dims.device)
        self.module: DashGPTModel = build_model(
            self.config,
            model,
            attention,
            dims,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            seed=seed,
        )
        self.telemetry = StepTelemetry(
            self.module, dims, attention, sequence_length=sequence_length, on_timing=self._time_stages
        )

    def loss_of_step(
        self,
        micro_batches: Sequence[MicroBatch],
        accumulate: Callable[[list[ShardBatch], int], float],
        *,
        step: int,
    ) -> tuple[float, int]:
        """Check a step's micro-batches and accumulate their gradients; returns the mean loss and its tokens.

        Args:
            accumulate: called with this rank's shards and the tokens of the global batch; returns the summed loss.
            step: for messages.

        Raises:
            BatchError, ExchangeError: see `Engine.train_step`.
        """
        self.telemetry.begin_step()
        tokens = count_loss_tokens(
            micro_batches,
            self.dims,
            sequence_length=self.sequence_length,
            vocab_size=self._vocab_size,
            chunk_size=self._attention.chunk_size,
        )
        shards = split_micro_batches(
            micro_batches,
            self.dims,
            layout=self._attention.layout,
            sequence_length=self.sequence_length,
            chunk_size=self._attention.chunk_size,
        )
        try:
            return accumulate(shards, tokens) / tokens, tokens
        except ExchangeError as error:
            raise ExchangeError(f"step {step}: {error}") from error

    def flops_per_step(self, tokens: int, *, document_length: float, density: float) -> float:
        """Return the floating-point operations of a step, see `Engine.flops_per_step`."""
        per_token = flops_per_token(
            self._model_config,
            self._attention,
            vocab_size=self._vocab_size,
            document_length=document_length,
            density=density,
        )
        return tokens * per_token

    def state(self, step: int) -> EngineState:
        """Return the state of an engine after `step` steps that is not a tensor."""
        return EngineState(
            step=step, sequence_length=self.sequence_length, identity=self.identity, function=self._function
        )

    def changes_since(self, saved: EngineState) -> list[str]:
        """Name each setting by which the weights now compute another function than in `saved`."""
        return [
            f"{name} was {saved.function[name]} and is {value}"
            for name, value in self._function.items()
            if value != saved.function[name]
        ]

    def _time_stages(self, timer: StepTimer | None) -> None:
        self.config.timers = timer

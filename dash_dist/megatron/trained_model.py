"""The model of a run as every engine trains it: its settings, its batches and its telemetry.

Knows the model and the checks of a step. Does not know how gradients become updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from dash_dist.checkpoints.engine_state import EngineState
from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.distributed.agreement import Agreement
from dash_dist.engine.batch import MicroBatch, count_loss_tokens
from dash_dist.engine.flops import flops_per_token
from dash_dist.engine.protocol import BucketLoss
from dash_dist.engine.step_timer import StepTimer
from dash_dist.engine.telemetry import StepTelemetry
from dash_dist.megatron.model import DashGPTModel, build_model, transformer_config
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.shard_batch import ShardBatch, split_micro_batches
from dash_dist.models.start import open_start

_SHAPES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_kv_heads",
    "tie_embeddings",
)


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
            **{name: getattr(model, name) for name in _SHAPES},
            **_not_default(model, ("attention_bias", "qk_norm")),
            **({"norms_after": True} if model.norms_after else {}),
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
            **{
                f"model.{name}": value
                for name, value in _not_default(model, ("family", "positions", "layers_without_positions")).items()
            },
            **_kinds(attention),
        }
        dtype = torch.bfloat16 if dims.device.type == "cuda" else torch.float32
        self.config = transformer_config(model, parallel, dtype=dtype, device=dims.device)
        self.module = self._build(seed)
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
        shards, tokens = self._shards(micro_batches)
        try:
            return accumulate(shards, tokens) / tokens, tokens
        except ExchangeError as error:
            raise ExchangeError(f"step {step}: {error}") from error

    def evaluate(
        self, micro_batches: Sequence[MicroBatch], forward: Callable[[list[ShardBatch]], torch.Tensor], *, step: int
    ) -> tuple[BucketLoss, ...]:
        """Check micro-batches and compute their losses, see `Engine.evaluate`.

        Args:
            forward: called without gradients with this rank's shards; returns its part of the `bucket_losses`.
            step: for messages.
        """
        shards, _ = self._shards(micro_batches)
        self.module.eval()  # no recomputation, and no memory for it
        try:
            with self.telemetry.paused(), torch.no_grad():
                losses = forward(shards)
        except ExchangeError as error:
            raise ExchangeError(f"evaluation after step {step}: {error}") from error
        finally:
            self.module.train()
        dist.all_reduce(losses)
        return tuple(BucketLoss(total, int(tokens)) for total, tokens in losses.tolist())

    def _shards(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[ShardBatch], int]:
        """Check micro-batches; returns this rank's shards, and the tokens of the global batch in its loss."""
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
        return shards, tokens

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
        names = [*self._function, *(name for name in saved.function if name not in self._function)]
        pairs = [(name, _setting(saved.function, name), _setting(self._function, name)) for name in names]
        return [f"{name} was {before} and is {now}" for name, before, now in pairs if before != now]

    def _build(self, seed: int) -> DashGPTModel:
        """Build this rank's stage; an error in `model.weights` at one rank is raised at every rank."""
        arguments: dict[str, Any] = {
            "vocab_size": self._vocab_size,
            "sequence_length": self.sequence_length,
            "seed": seed,
        }
        model, dims = self._model_config, self.dims
        if model.weights is None:
            return build_model(self.config, model, self._attention, dims, **arguments)
        built, problem = None, None
        try:
            with open_start(model, vocab_size=self._vocab_size) as source:
                built = build_model(self.config, model, self._attention, dims, source=source, **arguments)
        except (OSError, ValueError) as error:
            problem = ValueError(f"model.weights: {error}")
        Agreement().raise_first(problem)
        assert built is not None
        return built

    def _time_stages(self, timer: StepTimer | None) -> None:
        self.config.timers = timer


def _not_default(section: BaseModel, names: Iterable[str]) -> dict[str, Any]:
    """Settings that checkpoints name only where they are not the default, which older ones do not know."""
    values = section.model_dump(mode="json", include=set(names))
    fields = type(section).model_fields
    return {
        name: values[name]
        for name in names
        if getattr(section, name) != fields[name].get_default(call_default_factory=True)
    }


def _kinds(attention: AttentionConfig) -> dict[str, Any]:
    """Kinds of the layers, likewise, in the shortest spelling, so that equal ones compare equal."""
    pattern = attention.pattern
    if pattern == ("dash",):
        return {}
    window = {} if attention.window is None else {"attention.window": attention.window}
    return {"attention.kind": pattern[0] if len(pattern) == 1 else list(pattern), **window}


def _setting(function: Mapping[str, Any], name: str) -> Any:
    return function.get(name, "the default")

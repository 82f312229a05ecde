"""The model of a run as every engine trains it: its settings, its batches and its telemetry.

Knows the model and the checks of a step. Does not know how gradients become updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from dash_dist.checkpoints.engine_state import LORA, EngineState
from dash_dist.config.attention import AttentionConfig
from dash_dist.config.combination import check_combination
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig, offloaded_layers
from dash_dist.config.trainable import TrainableSection
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.distributed.agreement import Agreement
from dash_dist.engine.batch import MicroBatch, count_loss_tokens
from dash_dist.engine.flops import flops_per_token
from dash_dist.engine.protocol import BucketLoss
from dash_dist.engine.ranks import routed_attentions
from dash_dist.engine.step_timer import StepTimer
from dash_dist.engine.telemetry import StepTelemetry
from dash_dist.megatron.asked import AskedRows
from dash_dist.megatron.conversion import check_trained, mean_loss
from dash_dist.megatron.fp8 import check_device
from dash_dist.megatron.lora import add_adapters
from dash_dist.megatron.model import DashGPTModel, build_model, rotary_embedding, transformer_config
from dash_dist.megatron.offload import ActivationOffload
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.shard_batch import ShardBatch, split_micro_batches
from dash_dist.megatron.trainable import let_recomputed_layers_train, select_parameters
from dash_dist.models.nsa import nsa_layers, nsa_parameters
from dash_dist.models.start import open_start
from dash_dist.models.table import parameter_table

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

    Attributes:
        learning_rates: of this rank's parameters that have their own.
        offload: of the inputs of this stage's layers; None where all stay on the device.

    Raises:
        ValueError: the configuration is impossible (see `check_combination`), or not on this rank's device; or
            `trainable` names no parameter.
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
        trainable: TrainableSection,
    ) -> None:
        check_combination(model, attention, parallel, world_size=dims.world_size, sequence_length=sequence_length)
        if attention.backend == "triton" and dims.device.type != "cuda":
            raise ValueError(
                f"attention.backend=triton needs a CUDA GPU, and rank {dims.rank} is on {dims.device}: "
                "set attention.backend to auto or eager"
            )
        if parallel.fp8_linears:
            check_device(dims.device)
        self.dims = dims
        self.sequence_length = sequence_length
        self._model_config = model
        self._attention = attention
        self._parallel = parallel
        self._vocab_size = vocab_size
        self.identity = {
            **{name: getattr(model, name) for name in _SHAPES},
            **_not_default(model, ("attention_bias", "qk_norm")),
            **({"norms_after": True} if model.norms_after else {}),
            "head_dim": model.resolved_head_dim,
            "vocab_size": vocab_size,
            **({"nsa_layers": nsa_layers(model, attention)} if "nsa" in attention.pattern else {}),
        }
        """Settings that a checkpoint must share."""
        self._constants = {
            **{f"model.{name}": getattr(model, name) for name in ("rotary_base", "norm_epsilon")},
            **{f"attention.{name}": getattr(attention, name) for name in ("chunk_size", "alpha", "prior_sigma")},
            **{
                f"model.{name}": value
                for name, value in _not_default(model, ("family", "positions", "layers_without_positions")).items()
            },
            **_kinds(attention),
            **{f"attention.{name}": value for name, value in _not_default(attention, ("attend_first_chunk",)).items()},
            **({"parallel.fp8_linears": True} if parallel.fp8_linears else {}),
        }
        dtype = torch.bfloat16 if dims.device.type == "cuda" else torch.float32
        self.config = transformer_config(model, parallel, dtype=dtype, device=dims.device)
        self.module = self._build(seed)
        if trainable.lora is not None:
            add_adapters(self.module, model, trainable.lora, dims, seed=seed)
            self.identity[LORA] = trainable.lora.identity
        names = [*parameter_table(model, vocab_size), *nsa_parameters(model, attention)]
        self.learning_rates = select_parameters(self.module, trainable, names)
        self._conversion_loss: float | None = None
        if attention.conversion is None:
            let_recomputed_layers_train(self.module)
        else:
            check_trained([*trainable.learning_rates(names), *([LORA] if trainable.lora else ())])
        decoder = self.module.decoder
        recomputed = parallel.recompute_layers or len(decoder.layers)
        offloaded = offloaded_layers(parallel.offload_activations, recomputed, first_stage=dims.is_first_stage)
        self.offload: ActivationOffload | None = None
        if offloaded:
            self.offload = ActivationOffload(
                decoder, offloaded, recomputed=recomputed, hidden_size=model.hidden_size, device=dims.device
            )
        self.telemetry = self._telemetry()

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
        self._set_routing_scale(step)
        self.telemetry.begin_step()
        shards, tokens = self._shards(micro_batches)
        positions = sum(len(batch.tokens) for batch in micro_batches) * self.dims.dp_size * self.sequence_length
        for conversion in self.module.conversions():
            conversion.weight = tokens / positions  # the engine divides gradients by the tokens in the model's loss
        try:
            loss = accumulate(shards, tokens) / tokens
            if self._attention.conversion is not None:
                self._conversion_loss = mean_loss(
                    self.module.conversions(),
                    positions=positions,
                    num_layers=self._attention.kinds(self._model_config.num_layers).count("dash"),
                    device=self.dims.device,
                )
            return loss, tokens
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
        self._set_routing_scale(step)
        shards, _ = self._shards(micro_batches)
        with self._only_forward(step), self.telemetry.paused():
            losses = forward(shards)
        dist.all_reduce(losses)
        return tuple(BucketLoss(total, int(tokens)) for total, tokens in losses.tolist())

    def next_tokens(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        forward: Callable[[list[ShardBatch]], list[torch.Tensor]],
        *,
        step: int,
    ) -> torch.Tensor:
        """Check rows and compute their next tokens, see `Engine.next_tokens`.

        Args:
            forward: called without gradients with this rank's shards; returns `AskedRows.gather`'s `found`.
            step: for messages.
        """
        rows = AskedRows(tokens, positions, self.dims)
        shards, _ = self._shards(rows.micro_batches)
        with self._only_forward(step), self.telemetry.paused(keep_routing=True):
            found = forward(shards)
        return rows.gather(found, shards)

    def set_sequence_length(self, sequence_length: int) -> None:
        """Take sequences of another length from now on. Raises ValueError: see `check_combination`."""
        model, attention, dims = self._model_config, self._attention, self.dims
        check_combination(model, attention, self._parallel, world_size=dims.world_size, sequence_length=sequence_length)
        self.sequence_length = sequence_length
        self.module.rotary_pos_emb = rotary_embedding(model, attention, dims, sequence_length=sequence_length)
        self.telemetry = self._telemetry()

    @contextlib.contextmanager
    def _only_forward(self, step: int) -> Iterator[None]:
        self.module.eval()  # no recomputation, and no memory for it
        try:
            with torch.no_grad():
                yield
        except ExchangeError as error:
            raise ExchangeError(f"evaluation after step {step}: {error}") from error
        finally:
            self.module.train()

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
            step=step, sequence_length=self.sequence_length, identity=self.identity, function=self._function(step)
        )

    def curves(self) -> dict[str, float]:
        """Return measurements of the last step that not every run has, by the names of their curves."""
        curves = {} if self._attention.routing_warmup is None else {"routing/scale": self._routing_scale}
        if self._conversion_loss is not None:
            curves["routing/conversion_loss"] = self._conversion_loss
        return curves

    def _function(self, step: int) -> dict[str, Any]:
        """Settings of the function that step `step` trains."""
        return {**self._constants, "attention.routing_scale": self._attention.routing_scale_at(step)}

    def _set_routing_scale(self, step: int) -> None:
        """Give every layer the routing scale of a step. The kernels take it as an argument."""
        self._routing_scale = self._attention.routing_scale_at(step)
        if self._attention.routing_warmup is not None:
            for _, attention in routed_attentions(self.module):
                attention.spec = attention.spec.replaced(routing_scale=self._routing_scale)

    def changes_since(self, saved: EngineState) -> list[str]:
        """Name each setting by which the weights now compute another function than in `saved`."""
        function = self._function(saved.step)
        names = [*function, *(name for name in saved.function if name not in function)]
        pairs = [(name, _setting(saved.function, name), _setting(function, name)) for name in names]
        return [f"{name} was {before} and is {now}" for name, before, now in pairs if before != now]

    def _build(self, seed: int) -> DashGPTModel:
        """Build this rank's stage; an error in `model.weights` at one rank is raised at every rank."""
        arguments: dict[str, Any] = {
            "vocab_size": self._vocab_size,
            "sequence_length": self.sequence_length,
            "seed": seed,
            "fused": self._parallel.fused_kernels and self.dims.device.type == "cuda",
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

    def _telemetry(self) -> StepTelemetry:
        return StepTelemetry(
            self.module,
            self.dims,
            self._attention,
            sequence_length=self.sequence_length,
            on_timing=self._time_stages,
        )

    def _time_stages(self, timer: StepTimer | None) -> None:
        self.config.timers = timer


def describe_new_state(fresh: int) -> list[str]:
    """Say in words that `fresh` parameters found no optimizer state in a checkpoint."""
    if not fresh:
        return []
    return [f"{fresh} trained parameters have no optimizer state in the checkpoint: it starts anew"]


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
    top = {} if attention.top_chunks is None else {"attention.top_chunks": attention.top_chunks}
    rule = {"attention.infllmv2": attention.infllmv2_rule.model_dump()} if "infllmv2" in pattern else {}
    if "nsa" in pattern:
        rule["attention.nsa"] = attention.nsa_rule.model_dump()
    return {"attention.kind": pattern[0] if len(pattern) == 1 else list(pattern), **window, **top, **rule}


def _setting(function: Mapping[str, Any], name: str) -> Any:
    value = function.get(name, "the default")
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value

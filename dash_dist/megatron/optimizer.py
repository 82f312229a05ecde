"""AdamW, its schedule and the gradient reduction, all Megatron-core's.

Knows parameters and steps. Does not know the model's function.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    clip_grads,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig

_SET_BY_RUN = ("max_lr", "min_lr", "betas", "eps")


def wrap_model(config: TransformerConfig, parallel: ParallelConfig, model: MegatronModule) -> DistributedDataParallel:
    """The model with its gradients in float32 buffers that are summed over DP x CP when a step's backward is done."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=parallel.distributed_optimizer
    )
    return DistributedDataParallel(config, ddp_config, Float16Module(config, model) if config.bf16 else model)


class _HasParameterGroups(Protocol):
    param_groups: list[dict[str, Any]]


class Schedule:
    """The learning rate and weight decay of an optimizer's parameter groups, a function of the step number alone.

    Args:
        optimizer: a group with `wd_mult` 0.0 does not decay.
        config: what the run's YAML says.
        total_steps: of the run; the cosine ends there, unless `config` has `decay_steps`.

    Raises:
        ValueError: the warmup is not shorter than warmup and cosine together.
    """

    def __init__(self, optimizer: _HasParameterGroups, config: OptimizerConfig, *, total_steps: int) -> None:
        decay_steps = config.steps_of_decay(total_steps)
        if config.warmup_steps >= decay_steps:
            raise ValueError(
                f"warmup_steps {config.warmup_steps} is not below the {decay_steps} steps of the learning rate's "
                "decay: lower it or decay longer"
            )
        self._start = config.schedule_start
        self._megatron = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=decay_steps,
            lr_decay_style="cosine",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def set_step(self, step: int) -> None:
        """Choose the values of step `step`; the first step of a run is 1."""
        self._megatron.num_steps = 0
        self._megatron.step(max(0, step - self._start))


def scheduled_learning_rate(schedule: Mapping[str, Any], step: int) -> float:
    """Return the learning rate of step `step` under the settings of an `OptimizerConfig.schedule`."""
    config = OptimizerConfig(**schedule)
    optimizer = SimpleNamespace(param_groups=[{}])
    Schedule(optimizer, config, total_steps=schedule["decay_steps"]).set_step(step)
    return float(optimizer.param_groups[0]["lr"])


class Optimizer:
    """AdamW with a learning rate that is a function of the step number alone.

    Args:
        config: what the run's YAML says.
        parallel: says whether the state is sharded over DP x CP.
        model: wrapped by `wrap_model`.
        total_steps: of the run; the cosine ends there, unless `config` has `decay_steps`.
        dtype: of the weights.

    Raises:
        ValueError: the warmup is not shorter than warmup and cosine together.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parallel: ParallelConfig,
        model: DistributedDataParallel,
        *,
        total_steps: int,
        dtype: torch.dtype,
    ) -> None:
        self._grad_clip = config.grad_clip
        megatron_config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.grad_clip or 0.0,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        overrides = get_standard_config_overrides(megatron_config)
        overrides[ParamKey(name="*.summary_query")] = {"wd_mult": 0.0}
        self.megatron: MegatronOptimizer = get_megatron_optimizer(megatron_config, [model], overrides)
        for part in self.megatron.chained_optimizers:
            if isinstance(part, DistributedOptimizer):
                _save_with_padding(part)
            if isinstance(part.optimizer, torch.optim.AdamW):
                _start_torch_adam(part.optimizer)
                if isinstance(part, DistributedOptimizer):
                    _load_with_torch_adam(part)
        self._of_run = [
            {key: group[key] for key in _SET_BY_RUN if key in group} for group in self.megatron.param_groups
        ]
        self._schedule = Schedule(self.megatron, config, total_steps=total_steps)
        self.set_step(1)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the step that `set_step` named."""
        return float(self.megatron.param_groups[0]["lr"])

    def set_step(self, step: int) -> None:
        """Choose the learning rate of step `step`; the first step of a run is 1."""
        self._schedule.set_step(step)

    def zero_grad(self) -> None:
        """Let go of the last step's gradients; the model's gradient buffers are not cleared here."""
        self.megatron.zero_grad()

    def prepare(self) -> float:
        """Hand the reduced gradients to the optimizer.

        Returns:
            The global gradient norm before clipping.
        """
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def update(self, grad_norm: float) -> None:
        """Clip the prepared gradients to the configured norm and update the weights."""
        if self._grad_clip is not None:
            for part in self.megatron.chained_optimizers:
                parameters = part.get_parameters()
                if parameters:
                    clip_grads.clip_grad_by_total_norm_fp32(parameters, self._grad_clip, grad_norm)
        self.megatron.step_with_ready_grads()

    def sharded_state_dict(
        self, model_state: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
    ) -> dict[str, Any]:
        """The optimizer's state for Megatron's distributed checkpoint.

        Args:
            model_state: the model's `sharded_state_dict` made with the same `metadata`.
        """
        return self.megatron.sharded_state_dict(model_state, is_loading, metadata=metadata)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the moments from a checkpoint. The learning rates, betas and eps stay this run's."""
        with torch.no_grad():
            self.megatron.load_state_dict(state)
        for group, of_run in zip(self.megatron.param_groups, self._of_run, strict=True):
            group.update(of_run)
        for part in self.megatron.chained_optimizers:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for parameter_state in part.optimizer.state.values():
                    # Megatron hands every parameter the same counter, which each would then count up, and
                    # none where the checkpoint is of step 0.
                    parameter_state["step"] = torch.as_tensor(parameter_state.get("step", 0.0)).clone()


def _start_torch_adam(adam: torch.optim.AdamW) -> None:
    """Create the state that torch would create in the first step: Megatron cannot save or load without it."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def _save_with_padding(optimizer: DistributedOptimizer) -> None:
    """Let a distributed optimizer of several buckets save each parameter's state, and not its neighbour's.

    Tied embeddings on several pipeline stages get a bucket of their own. Megatron gathers the buckets' content without
    the padding at their ends, and then looks for the parameters where they are with it.
    """
    gather = optimizer.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state = gather(*args, **kwargs)
        if state is not None:
            for index, buffer in enumerate(optimizer.buffers):
                for tensors in state[index].values():
                    for name, tensor in tensors.items():
                        if isinstance(tensor, torch.Tensor):
                            tensors[name] = pad(tensor, buffer)
        return state

    def pad(tensor: torch.Tensor, buffer: Any) -> torch.Tensor:
        if len(buffer.buckets) == 1:
            return tensor
        padded = tensor.new_zeros(buffer.numel)
        pieces = tensor.split([bucket.numel_unpadded for bucket in buffer.buckets])
        for bucket, piece in zip(buffer.buckets, pieces, strict=True):
            padded[bucket.offset : bucket.offset + piece.numel()] = piece
        return padded

    optimizer.get_parameter_state_dp_zero = gather_with_padding


def _load_with_torch_adam(optimizer: DistributedOptimizer) -> None:
    """Let a distributed optimizer around torch's AdamW load its checkpoint.

    Megatron expects Apex's or Transformer Engine's Adam, whose state per parameter has no `step`: it would
    look for one in the checkpoint, which keeps it per group, where Megatron has read it by then.
    """
    set_state = optimizer._set_main_param_and_optimizer_states

    def set_state_with_step(model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, index = optimizer.model_param_group_index_map[model_parameter]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][index]]
        set_state(model_parameter, {"step": state["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = set_state_with_step

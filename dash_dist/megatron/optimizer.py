"""AdamW, its schedule and the gradient reduction, all Megatron-core's.

Knows parameters and steps. Does not know the model's function.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.megatron.host_moments import offload_moments
from dash_dist.megatron.optimizer_state import set_updates
from dash_dist.megatron.torch_adam import fuse, start_torch_adam
from dash_dist.megatron.trainable import LearningRates


class _Gradients(DistributedDataParallel):
    """Megatron-core's gradient buffers, which go when nobody uses them any more.

    Megatron hangs a hook that holds the whole object on every weight, in C++, where Python's garbage collector cannot
    see the cycle: the model of one stage of a run would stay on the device through the next ones.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        this = weakref.ref(self)

        def hook(*unused: Any) -> None:
            gradients = this()
            if gradients is not None:
                DistributedDataParallel._make_backward_post_hook(gradients, param)(*unused)

        return hook


def wrap_model(config: TransformerConfig, parallel: ParallelConfig, model: MegatronModule) -> DistributedDataParallel:
    """The model with its gradients in float32 buffers that are summed over DP x CP: when a step's backward pass is
    done, or with `parallel.overlap_gradients` bucket by bucket in the pass of the last micro-batch."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_gradients,
    )
    wrapped = _Gradients(config, ddp_config, Float16Module(config, model) if config.bf16 else model)
    if parallel.overlap_gradients:
        config.no_sync_func = wrapped.no_sync
    return wrapped


class _HasParameterGroups(Protocol):
    param_groups: list[dict[str, Any]]


class Schedule:
    """The learning rate and weight decay of an optimizer's parameter groups, a function of the step number alone.

    Args:
        optimizer: a group with `wd_mult` 0.0 does not decay, and one with the settings of `own_schedule` follows those.
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

    @property
    def learning_rate(self) -> float:
        """That of parameters without their own, at the step that `set_step` named."""
        return float(self._megatron.get_lr({}))


def own_schedule(config: OptimizerConfig, lr: float) -> dict[str, float]:
    """Settings of a parameter group that follows the schedule of `optimizer.lr`, scaled to `lr`."""
    return {"max_lr": lr, "min_lr": config.min_lr * lr / config.lr}


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
        learning_rates: of parameters that do not follow `config.lr`.

    Attributes:
        updates: steps that changed the weights, by which AdamW corrects its moments' bias.

    Raises:
        ValueError: the warmup is not shorter than warmup and cosine together.
        RankError: the host has too little memory for `config.offload_moments`.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parallel: ParallelConfig,
        model: DistributedDataParallel,
        *,
        total_steps: int,
        dtype: torch.dtype,
        learning_rates: LearningRates,
    ) -> None:
        self._grad_clip = config.grad_clip
        self._device = next(model.parameters()).device
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
        for lr in set(learning_rates.values()):
            parameters = frozenset(parameter for parameter, own in learning_rates.items() if own == lr)
            predicate = ParamPredicate(name=f"lr {lr}", fn=parameters.__contains__)
            overrides[ParamKey(predicate=predicate)] = own_schedule(config, lr)
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            megatron_config, [model], overrides, use_gloo_process_groups=False
        )
        for part in self.megatron.chained_optimizers:
            if isinstance(part.optimizer, torch.optim.AdamW):
                fuse(part.optimizer)
                if config.offload_moments:
                    offload_moments(part.optimizer, config.offload_moments)
                start_torch_adam(part.optimizer)
            elif config.offload_moments:
                raise ValueError(
                    "optimizer.offload_moments needs PyTorch's AdamW, and Megatron-core takes "
                    f"{type(part.optimizer).__module__}: set it to 0, or uninstall Apex and Transformer Engine"
                )
        self.updates = 0
        self._schedule = Schedule(self.megatron, config, total_steps=total_steps)
        self.set_step(1)

    @property
    def learning_rate(self) -> float:
        """Learning rate of parameters without their own, of the step that `set_step` named."""
        return self._schedule.learning_rate

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
        # Megatron-core's own norm makes the host wait for the device once a parameter, without Apex.
        parts = self.megatron.chained_optimizers
        gradients = [gradient for part in parts for gradient in part.get_main_grads_for_grad_norm()]
        squared = get_total_norm(gradients).to(self._device).square()
        dist.all_reduce(squared, group=self.megatron.get_grad_stats_parallel_group())
        return math.sqrt(squared.item())

    def update(self, grad_norm: float) -> None:
        """Clip the prepared gradients to the configured norm and update the weights."""
        if self._grad_clip is not None and grad_norm > self._grad_clip:
            parameters = [parameter for part in self.megatron.chained_optimizers for parameter in part.get_parameters()]
            clip_grads_with_norm_(parameters, self._grad_clip, torch.full((), grad_norm, device=self._device))
        self.megatron.step_with_ready_grads()
        self.updates += 1

    def continue_from(self, updates: int) -> None:
        """Count from a checkpoint's number of updates, whose moments have been loaded."""
        self.updates = updates
        set_updates(self.megatron, updates)

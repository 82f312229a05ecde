"""ZeRO around AdamW: gradients are reduced, clipped and turned into updates by DeepSpeed.

Knows DeepSpeed's engine and its settings. Does not know the model's function, nor files.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dash_dist.config.deepspeed import DeepSpeedSettings
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.deepspeed_engine.runtime import ParallelUnit, start_deepspeed
from dash_dist.megatron.optimizer import Schedule, own_schedule
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.trainable import LearningRates


class ZeroOptimizer:
    """A model whose optimizer state, gradients and weights are sharded over DP x CP, as the ZeRO stage says.

    Clipping, moments and decay are those of `dash_dist.megatron.optimizer.Optimizer`, and so is the schedule.

    Args:
        model: on its device, the same at every rank. At stage 3 its parameters are empty between the passes.
        config: what the run's YAML says.
        settings: DeepSpeed's.
        dims: of the run; tensor- and pipeline-parallel sizes are 1.
        total_steps: of the run; the cosine ends there, unless `config` has `decay_steps`.
        learning_rates: of parameters that do not follow `config.lr`.

    Raises:
        ValueError: the warmup is not shorter than warmup and cosine together, or DeepSpeed would use another kind of
            device.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        settings: DeepSpeedSettings,
        dims: ParallelDims,
        *,
        total_steps: int,
        learning_rates: LearningRates | None = None,
    ) -> None:
        deepspeed = start_deepspeed(dims)
        dtype = next(model.parameters()).dtype
        self.stage = settings.zero_optimization.stage
        adam = torch.optim.AdamW(
            _parameter_groups(model, config, learning_rates or {}),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=dims.device.type == "cuda",  # no temporary copies of the rank's whole share
        )
        self._schedule = Schedule(adam, config, total_steps=total_steps)
        self._schedule.set_step(1)
        self.adam = adam
        self._world_size = dims.world_size
        self._engine, *_ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=dims.device.index or 0),
            model=model,
            optimizer=adam,
            config=_deepspeed_config(settings, config, dtype),
            mpu=ParallelUnit(dims),
            dist_init_required=False,
        )
        self.sharded: Any = self._engine.optimizer
        """DeepSpeed's optimizer of this stage."""
        _start_adam(adam, flat_weights(self.sharded))
        if self.stage < 3:
            self.sharded._lazy_init_hp_params_optimizer_state()  # as after the first step: views for each parameter

    @property
    def learning_rate(self) -> float:
        """Learning rate of parameters without their own, of the step that `set_step` named."""
        return self._schedule.learning_rate

    def set_step(self, step: int) -> None:
        """Choose the learning rate of step `step`; the first step of a run is 1."""
        self._schedule.set_step(step)

    def forward(self, *arguments: Any, last: bool, **options: Any) -> torch.Tensor:
        """The model's forward pass; `last` says that the step's gradients are complete after its backward pass."""
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(*arguments, **options)

    def backward(self, loss: torch.Tensor, *, weight: float) -> None:
        """Add the gradient of `weight` x the sum of all ranks' `loss` to the step's.

        A loss that is not finite makes its whole gradient NaN, so that `update` skips the step whatever the model's
        backward pass would have made of it.

        Args:
            loss: scalar, of this rank's tokens.
        """
        scale = weight * self._world_size  # ZeRO averages over the ranks
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), scale, math.nan), scale_wrt_gas=False)

    def update(self) -> tuple[float, bool]:
        """Clip the step's gradients, update the weights, and gather them where the stage keeps whole ones.

        Returns:
            The global gradient norm before clipping, and whether the step was skipped at all ranks because that is not
            finite; the norm is infinite then, and neither weights nor moments have changed.
        """
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), bool(self.sharded.overflow)

    @property
    def updates(self) -> int:
        """Steps that were not skipped; AdamW corrects its moments' bias by their number."""
        return int(next(iter(self.adam.state.values()))["step"])

    @updates.setter
    def updates(self, updates: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(updates)

    def share_weights(self) -> None:
        """Make the model's weights those of the optimizer's float32 copy, after that was changed from outside."""
        if self.stage < 3:
            self.sharded.update_lp_params()
            return
        from deepspeed.utils import safe_get_local_fp32_param

        self.sharded.checkpoint_event_prologue()  # no parameter stays whole
        for parameter in self._engine.module.parameters():
            if not parameter.requires_grad:
                continue  # has no float32 copy
            parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))
        self.sharded.checkpoint_event_epilogue()  # the small ones are whole again


def flat_weights(sharded: Any) -> list[torch.Tensor]:
    """The optimizer's float32 weights of this rank, as the flat tensors that AdamW works on."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(sharded, name):  # stage 3, stages 1 and 2, stage 1 with bfloat16 weights
            return list(getattr(sharded, name))
    raise TypeError(f"DeepSpeed's {type(sharded).__name__} is not known: use the version that the project names")


def _parameter_groups(model: nn.Module, config: OptimizerConfig, learning_rates: LearningRates) -> list[dict[str, Any]]:
    """As in the other engine, norm weights and `summary_query` do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.dim() == 1 or name.endswith("summary_query") else 1.0
            groups.setdefault((decay, learning_rates.get(parameter, config.lr)), []).append(parameter)
    return [
        {"params": parameters, "wd_mult": decay, **own_schedule(config, lr)}
        for (decay, lr), parameters in groups.items()
    ]


def _deepspeed_config(settings: DeepSpeedSettings, optimizer: OptimizerConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        **settings.model_dump(),
        # Micro-batches are counted by `forward`'s `last`, whatever is said here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.grad_clip or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},  # would wait for the device in every forward pass
    }


def _start_adam(adam: torch.optim.AdamW, weights: list[torch.Tensor]) -> None:
    """Create the state that torch would create in the first step: a checkpoint may be loaded or written before."""
    for weight in weights:
        adam.state[weight] = {
            "step": torch.zeros((), device=weight.device if adam.defaults["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(weight, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weight, requires_grad=False),
        }

"""The section `optimizer:`, AdamW and its learning-rate schedule.

Knows the allowed values; does not know the run's number of steps.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.section import Section


class OptimizerConfig(Section):
    """AdamW with a linear warmup to `lr`, then a cosine decay to `min_lr`, which then stays."""

    lr: float = Field(gt=0.0)
    min_lr: float = Field(default=0.0, ge=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0, description="not applied to norm weights nor to summary_query")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    grad_clip: float | None = Field(default=1.0, gt=0.0, description="largest global gradient norm; None: no clipping")
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int | None = Field(
        default=None,
        gt=0,
        description="steps after schedule_start at which the cosine reaches min_lr; None: the last step",
    )
    offload_moments: float = Field(
        default=0.0, ge=0.0, le=1.0, description="share of AdamW's moments in host memory between the updates"
    )
    schedule_start: int = Field(default=0, ge=0, description="steps of the run before the schedule begins")

    def schedule(self, total_steps: int) -> dict[str, int | float]:
        """Return the settings that determine the learning rate of every step of a run of `total_steps`."""
        return {
            "lr": self.lr,
            "min_lr": self.min_lr,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.steps_of_decay(total_steps),
            "schedule_start": self.schedule_start,
        }

    def steps_of_decay(self, total_steps: int) -> int:
        """Return the steps from `schedule_start` to the end of the decay in a run of `total_steps`."""
        return self.decay_steps or max(1, total_steps - self.schedule_start)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}: lower min_lr")
        return self


def check_offload(optimizer: OptimizerConfig, parallel: ParallelConfig, engine: str) -> None:
    """Refuse moments on the host where the engine cannot have them there.

    Raises:
        ValueError: the message gives the value and the change to make.
    """
    if not optimizer.offload_moments:
        return
    given = f"optimizer.offload_moments is {optimizer.offload_moments}"
    if engine != "megatron":
        raise ValueError(f"{given}, and engine: {engine} keeps its state on the device: set engine to megatron")
    if not parallel.distributed_optimizer:
        raise ValueError(
            f"{given}, and parallel.distributed_optimizer is false, by which every rank would keep the moments of all: "
            "set parallel.distributed_optimizer to true"
        )

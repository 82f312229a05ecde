"""The runs that the tests of `engine: deepspeed` compare. Nothing of Megatron-core or DeepSpeed."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.models import Case

STEPS = 6
STEPS_BEFORE_SAVE = 3
STEPS_AFTER_LOAD = 3


@dataclass(frozen=True)
class Run:
    """`zero_stage` None is `engine: megatron`. In `bad_step` the last rank's loss is infinite, its gradients not."""

    zero_stage: int | None
    case: Case = field(default_factory=Case)
    steps: int = STEPS
    bfloat16: bool = False
    bad_step: int | None = None
    decay_steps: int | None = None
    trainable: tuple[dict[str, Any], ...] | None = None  # patterns
    lora: dict[str, Any] | None = None


@dataclass
class Trained:
    """What one rank saw; `unchanged` says whether the bad step left weights and moments bit by bit as they were."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    unchanged: bool | None = None
    sent_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of the last step by part
    chunks: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # selected by layer 0 in the last step
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

"""The runs that the tests of `engine: deepspeed` compare. Nothing of Megatron-core or DeepSpeed."""

from dataclasses import dataclass, field

import torch
from megatron_cases import Case

STEPS = 12


@dataclass(frozen=True)
class Run:
    """`zero_stage` None is `engine: megatron`."""

    zero_stage: int | None
    case: Case = field(default_factory=Case)
    bfloat16: bool = False


@dataclass
class Trained:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    sent_bytes: int | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

"""PyTorch's AdamW, which Megatron-core takes without Apex and Transformer Engine: its kernels and its first state.

Knows torch's AdamW; does not know where its parameters come from.

Without `fused`, torch updates in a dozen passes over memory, with the roots of all second moments beside them.
"""

from __future__ import annotations

from typing import Any

import torch

FUSED_ON = ("cuda",)
"""Devices whose updates are one pass; on a CPU the plain update is the reference."""


def fuse(adam: torch.optim.AdamW) -> None:
    """Have `step` update a group's parameters in one pass over memory where all are on a GPU.

    Args:
        adam: without state.
    """
    for group in adam.param_groups:
        if all(parameter.device.type in FUSED_ON for parameter in group["params"]):
            group["fused"] = True


def start_torch_adam(adam: torch.optim.AdamW) -> None:
    """Create the state that torch would create in the first step, where there is none: it is saved and loaded."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if parameter in adam.state:
                continue
            adam.state[parameter] = {
                "step": no_updates(parameter, group),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def no_updates(parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The number of a parameter's updates before the first, where torch reads it: fused, that is the device."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")

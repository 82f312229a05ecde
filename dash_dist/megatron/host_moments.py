"""AdamW's moments in host memory between the updates.

Knows torch's AdamW; does not know where its parameters come from.

An update brings the moments of one piece of a parameter to the device, computes as AdamW does, and takes them back.
The result is bit for bit that of moments on the device: AdamW works on each number alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

from dash_dist.megatron.host_memory import require_host_bytes
from dash_dist.megatron.torch_adam import no_updates

PIECE = 2**26
"""Numbers that are updated at a time: half a gigabyte of moments on the device."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def offload_moments(adam: torch.optim.AdamW, share: float) -> None:
    """Create the state of a share of an optimizer's numbers with moments on the host, and have `step` update it there.

    Args:
        adam: without state for these parameters.
        share: of the numbers, from the first parameter on, in whole parameters.

    Raises:
        RankError: the host has too little memory left.
    """
    parameters = {parameter: group for group in adam.param_groups for parameter in group["params"]}
    wanted = share * sum(parameter.numel() for parameter in parameters)
    away: dict[torch.Tensor, dict[str, Any]] = {}
    numbers = size = 0
    for parameter, group in parameters.items():
        if numbers >= wanted:
            break
        numbers += parameter.numel()
        size += len(_MOMENTS) * pinned_bytes(parameter.numel() * torch.float32.itemsize)
        away[parameter] = group
    require_host_bytes(
        size,
        "optimizer.offload_moments",
        " at this rank",
        "lower optimizer.offload_moments, shard the state over more ranks",
    )
    for parameter, group in away.items():
        adam.state[parameter] = {"step": no_updates(parameter, group)} | {
            name: torch.zeros(parameter.shape, dtype=torch.float32, pin_memory=parameter.is_cuda) for name in _MOMENTS
        }
    step = adam.step

    def step_from_host() -> None:
        kept = [group["params"] for group in adam.param_groups]
        try:
            for group, own in zip(adam.param_groups, kept, strict=True):
                group["params"] = [parameter for parameter in own if parameter not in away]
            step()
        finally:
            for group, own in zip(adam.param_groups, kept, strict=True):
                group["params"] = own
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter in away and parameter.grad is not None:
                    _update(parameter, adam.state[parameter], group)
        if any(parameter.is_cuda for parameter in away):
            torch.cuda.current_stream().synchronize()  # the host may read the moments now

    patched: Any = adam
    patched.step = step_from_host


@torch.no_grad()
def _update(parameter: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    before = state["step"].clone()
    flat, gradient = parameter.detach().view(-1), parameter.grad.view(-1)
    moments = [state[name].view(-1) for name in _MOMENTS]
    for first in range(0, flat.numel(), PIECE):
        piece = slice(first, first + PIECE)
        # On the computing stream: copies and update follow each other, and their memory is used again in that order.
        here = [moment[piece].to(flat.device, non_blocking=True, copy=True) for moment in moments]
        adamw(
            [flat[piece]],
            [gradient[piece]],
            [here[0]],
            [here[1]],
            [],
            [state["step"].copy_(before)],  # it is counted once, not once a piece
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for moment, updated in zip(moments, here, strict=True):
            moment[piece].copy_(updated, non_blocking=True)


def pinned_bytes(size: int) -> int:
    """Return what torch's allocator of pinned memory takes for a tensor of so many bytes: a power of two."""
    return 1 << (size - 1).bit_length()

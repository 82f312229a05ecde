"""Which part of every weight and of its moments a rank owns, at any ZeRO stage.

Knows where DeepSpeed keeps the shards of its optimizers. Does not know files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dash_dist.deepspeed_engine.zero import ZeroOptimizer

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedSlice:
    """Consecutive elements of one parameter that this rank writes, and that its optimizer updates if it is trained.

    Attributes:
        parameter: its name in the model.
        start: of the first element, in the flattened parameter.
        tensors: "weight", "exp_avg" and "exp_avg_sq", float32 [elements]; views of what the optimizer works on. A
            frozen parameter has its "weight" alone, in the model's dtype.
    """

    parameter: str
    start: int
    tensors: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tensors[WEIGHT])


def parameter_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of the whole parameters, sharded or not."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in model.named_parameters()}


def owned_slices(model: nn.Module, optimizer: ZeroOptimizer) -> list[OwnedSlice]:
    """This rank's slices; those of all ranks cover every parameter once.

    Args:
        model: the one that `optimizer` trains.
    """
    return _slices(model, optimizer, _share)


def needed_slices(model: nn.Module, optimizer: ZeroOptimizer) -> list[OwnedSlice]:
    """The slices that this rank reads: its own, and the whole of a frozen parameter that it keeps whole."""
    return _slices(model, optimizer, lambda weight: slice(0, len(weight)))


def _slices(
    model: nn.Module, optimizer: ZeroOptimizer, part_of_replica: Callable[[torch.Tensor], slice]
) -> list[OwnedSlice]:
    """Slices of trained and frozen parameters; `part_of_replica` of a flat frozen one that every rank has."""
    found: list[OwnedSlice | None] = []
    for name, parameter in model.named_parameters():
        if optimizer.stage == 3:
            found.append(_slice_of_partition(name, parameter))
        elif parameter.requires_grad:
            found.append(_slice_of_group(name, parameter))
        else:
            weight = parameter.detach().view(-1)
            part = part_of_replica(weight)
            found.append(OwnedSlice(name, part.start, {WEIGHT: weight[part]}))
    return [one for one in found if one is not None and len(one)]


def _share(weight: torch.Tensor) -> slice:
    """This rank's share of a tensor that every rank has."""
    size = -(-len(weight) // dist.get_world_size())
    return slice(min(dist.get_rank() * size, len(weight)), min((dist.get_rank() + 1) * size, len(weight)))


def _slice_of_group(name: str, parameter: nn.Parameter) -> OwnedSlice | None:
    """Stages 1 and 2: parameters follow each other in one flat tensor per group, cut into equal parts."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    keys = (None, *MOMENTS)
    tensors = (mapping.get_hp_fragment(optim_state_key=key).detach() for key in keys)
    return OwnedSlice(name, mapping.lp_fragment_address.start, dict(zip((WEIGHT, *MOMENTS), tensors, strict=True)))


def _slice_of_partition(name: str, parameter: nn.Parameter) -> OwnedSlice:
    """Stage 3: every parameter is cut into equal parts, the last ones padded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    size: int = parameter.partition_numel()  # type: ignore[attr-defined]
    start = size * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    whole: int = parameter.ds_numel  # type: ignore[attr-defined]
    owned = slice(0, max(0, min(size, whole - start)))
    if parameter.requires_grad:
        tensors = {WEIGHT: safe_get_local_fp32_param(parameter)}
        tensors |= {key: safe_get_local_optimizer_state(parameter, key) for key in MOMENTS}
    else:
        tensors = {WEIGHT: parameter.ds_tensor}  # type: ignore[attr-defined]
    return OwnedSlice(name, start, {key: tensor.detach().view(-1)[owned] for key, tensor in tensors.items()})

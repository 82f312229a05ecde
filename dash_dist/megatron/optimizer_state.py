"""Optimizer state by parameter, as Megatron-core's distributed checkpoint holds it.

Knows where Megatron-core's optimizers keep the float32 weights and moments. Does not know files.

Megatron-core's own format names the parameter groups, and stacks the layers, all of which must have a state then. This
one names parameters alone: what a run trains may change between the checkpoint and its resume.

    optimizer.state.exp_avg.NAME    and exp_avg_sq; `param` or `fp32_param`, the float32 weights beside bfloat16 ones
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import nn

_PREFIX = "optimizer.state"
_LAYERS = re.compile(r"(?<=\.layers\.)")
MOMENTS = ("exp_avg", "exp_avg_sq")

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory
Named = dict[nn.Parameter, Sharded]


@dataclass(frozen=True)
class _Owned:
    """State of one parameter at this rank.

    Attributes:
        parameter: the model's.
        tensors: state by its name in the checkpoint, as the optimizer works on it.
        part: elements of the flattened parameter that `tensors` hold; None for all of it.
    """

    parameter: nn.Parameter
    tensors: dict[str, torch.Tensor]
    part: slice | None = None


def state_to_save(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[int, dict[str, Sharded]]:
    """Return the tensors of all trained parameters. A collective over DP x CP for a distributed optimizer.

    Args:
        model_state: the model's `sharded_state_dict`.
    """
    named = _by_parameter(model_state)
    return {
        index: {key: _renamed(named[one.parameter], key, tensor) for key, tensor in one.tensors.items()}
        for index, one in enumerate(_whole_states(optimizer))
    }


def load_state(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    stored: AbstractSet[str],
    read: Callable[[dict[int, dict[str, Sharded]]], dict[int, dict[str, torch.Tensor]]],
) -> tuple[int, set[str]]:
    """Take the state of the trained parameters that a checkpoint has, and start that of the others anew.

    The model's weights must be those of the checkpoint already.

    Args:
        model_state: the model's `sharded_state_dict`.
        stored: names of the tensors in the checkpoint.
        read: reads the tensors described. A collective.

    Returns:
        The number of this rank's parameters whose state was read, and the names of those without one.
    """
    optimizer.reload_model_params()
    named = _by_parameter(model_state)
    owned: dict[int, _Owned] = {}
    wanted: dict[int, dict[str, Sharded]] = {}
    fresh: set[str] = set()
    for index, one in enumerate(_owned_states(optimizer)):
        for moment in MOMENTS:
            one.tensors[moment].zero_()
        sharded = named[one.parameter]
        names = _tensor_names(sharded, MOMENTS[0])
        if not names <= stored:
            fresh |= names
            continue
        owned[index] = one
        wanted[index] = {key: _renamed(sharded, key, _whole(one, tensor)) for key, tensor in one.tensors.items()}
    for index, tensors in read(wanted).items():
        one = owned[index]
        for key, tensor in tensors.items():
            one.tensors[key].copy_(tensor if one.part is None else tensor.flatten()[one.part])
    return len(owned), fresh


def start_torch_adam(adam: torch.optim.AdamW) -> None:
    """Create the state that torch would create in the first step, where there is none: it is saved and loaded."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if parameter in adam.state:
                continue
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def set_updates(optimizer: MegatronOptimizer, updates: int) -> None:
    """Set the number of updates by which AdamW corrects its moments' bias."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"].fill_(updates)
        else:  # Apex's and Transformer Engine's count by group
            for group in part.param_groups:
                group["step"] = updates


def save_with_padding(optimizer: DistributedOptimizer) -> None:
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


def _whole_states(optimizer: MegatronOptimizer) -> Iterator[_Owned]:
    """State of whole parameters to save; of a distributed optimizer, at the first rank of DP x CP alone."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer):
            yield from _states_of(part)
            continue
        gathered = part.get_parameter_state_dp_zero(use_gloo_comm=True)
        if gathered is None:
            continue
        for index, buffer in enumerate(part.buffers):
            (tensors,) = gathered[index].values()
            for parameter, (start, end, _) in buffer.param_index_map.items():
                keys = ("param", *MOMENTS)
                yield _Owned(parameter, {key: tensors[key][start:end].view(parameter.shape) for key in keys})


def _owned_states(optimizer: MegatronOptimizer) -> Iterator[_Owned]:
    """State that this rank's optimizer works on."""
    for part in optimizer.chained_optimizers:
        yield from _states_of(part)


def _states_of(part: MegatronOptimizer) -> Iterator[_Owned]:
    if isinstance(part, DistributedOptimizer):
        for parameter in part.model_param_gbuf_map:
            tensors = part._get_main_param_and_optimizer_states(parameter)
            inside = part._get_model_param_range_map(parameter)["param"]
            kept = {key: tensors[key].detach() for key in ("param", *MOMENTS)}
            yield _Owned(parameter, kept, slice(inside.start, inside.end))
        return
    state = part.optimizer.state
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(parameters, mains, strict=True):
                moments = {key: state[main][key] for key in MOMENTS}
                yield _Owned(parameter, {"fp32_param": main.detach(), **moments})
        groups = part.fp32_from_fp32_groups
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
    for parameters in groups:
        for parameter in parameters:
            yield _Owned(parameter, {key: state[parameter][key] for key in MOMENTS})


def _whole(one: _Owned, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the whole parameter's shape to read into; the optimizer's own where it has all of it."""
    return tensor if one.part is None else torch.empty(one.parameter.shape, dtype=torch.float32)


def _by_parameter(model_state: dict[str, Any]) -> Named:
    return {sharded.data: _apart(sharded) for sharded in nested_values(model_state)}


def _renamed(sharded: Sharded, key: str, tensor: torch.Tensor) -> Sharded:
    name = f"{_PREFIX}.{key}.{sharded.key}"
    if isinstance(sharded, ShardedTensorFactory):
        return replace(sharded, key=name, data=tensor)
    return replace(sharded, key=name, data=tensor, dtype=tensor.dtype)


def _tensor_names(sharded: Sharded, key: str) -> set[str]:
    """Names that the state `key` of a parameter has in a checkpoint."""
    renamed = _renamed(sharded, key, sharded.data.detach())
    if isinstance(renamed, ShardedTensor):
        return {renamed.key}
    return {one.key for one in nested_values(renamed.build())}


def _apart(sharded: Sharded) -> Sharded:
    """The same tensor with its layer in its name rather than in its first dimension."""
    if isinstance(sharded, ShardedTensor):
        return _without_layers(sharded)

    def build(*arguments: Any) -> Any:
        built = sharded.build_fn(*arguments)
        assert isinstance(built, list)  # of SwiGLU's halves
        return [_without_layers(one) for one in built]

    return replace(sharded, build_fn=build)


def _without_layers(sharded: ShardedTensor) -> ShardedTensor:
    if not sharded.prepend_axis_num:
        return sharded
    assert sharded.prepend_axis_num == 1
    layer = sharded.global_offset[0]
    return replace(
        sharded,
        key=_LAYERS.sub(f"{layer}.", sharded.key, count=1),
        global_shape=sharded.global_shape[1:],
        global_offset=sharded.global_offset[1:],
        axis_fragmentations=sharded.axis_fragmentations[1:],
        prepend_axis_num=0,
    )

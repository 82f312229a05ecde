"""Optimizer state by parameter, as Megatron-core's distributed checkpoint holds it.

Knows where Megatron-core's optimizers keep the float32 weights and moments. Does not know files.

Megatron-core's own format names the parameter groups, and stacks the layers, all of which must have a state then. This
one names parameters alone: what a run trains may change between the checkpoint and its resume.

    optimizer.state.exp_avg.NAME    and exp_avg_sq; `param` or `fp32_param`, the float32 weights beside bfloat16 ones

A distributed optimizer cuts its flat buffers into equal parts, and so a parameter between any two of its elements. Such
a part is a few rectangular blocks of the parameter. The checkpoint holds these as they are: no rank needs another's.
"""

from __future__ import annotations

import math
import operator
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

from dash_dist.megatron.blocks import blocks_of

_PREFIX = "optimizer.state"
_LAYERS = re.compile(r"(?<=\.layers\.)")
MOMENTS = ("exp_avg", "exp_avg_sq")

Named: TypeAlias = dict[nn.Parameter, ShardedTensor | ShardedTensorFactory]


@dataclass(frozen=True)
class StateToSave:
    """State of the optimizer at one rank, in blocks of tensors of the checkpoint.

    Attributes:
        own: that no other rank of DP x CP has.
        replicated: that all ranks of DP x CP have, in the same order.
    """

    own: list[ShardedTensor]
    replicated: list[ShardedTensor]


@dataclass(frozen=True)
class _Owned:
    """State of one parameter that this rank's optimizer works on.

    Attributes:
        parameter: the model's.
        tensors: consecutive elements of the flattened state, by its name in the checkpoint.
        start: the first of these elements.
        replicated: True if the other ranks of DP x CP have the same.
    """

    parameter: nn.Parameter
    tensors: dict[str, torch.Tensor]
    start: int = 0
    replicated: bool = True


def state_to_save(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> StateToSave:
    """Describe the state of all trained parameters, without a copy of it. Local.

    Args:
        model_state: the model's `sharded_state_dict`.
    """
    named = _by_parameter(model_state)
    found = StateToSave([], [])
    for one in _owned_states(optimizer):
        blocks = found.replicated if one.replicated else found.own
        blocks += [block for key, tensor in one.tensors.items() for block in _blocks(one, named, key, tensor)]
    return found


def load_state(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    stored: AbstractSet[str],
    read: Callable[[list[ShardedTensor]], None],
) -> tuple[int, set[str]]:
    """Take the state of the trained parameters that a checkpoint has, and start that of the others anew.

    The model's weights must be those of the checkpoint already.

    Args:
        model_state: the model's `sharded_state_dict`.
        stored: names of the tensors in the checkpoint.
        read: reads the blocks described into their tensors. A collective.

    Returns:
        The number of this rank's parameters whose state was read, and the names of those without one.
    """
    optimizer.reload_model_params()
    named = _by_parameter(model_state)
    wanted: list[ShardedTensor] = []
    fresh: set[str] = set()
    known = 0
    for one in _owned_states(optimizer):
        for moment in MOMENTS:
            one.tensors[moment].zero_()
        names = {_tensor_name(shard, MOMENTS[0]) for shard, _ in _shards_of(named[one.parameter])}
        if not names <= stored:
            fresh |= names
            continue
        known += 1
        wanted += [block for key, tensor in one.tensors.items() for block in _blocks(one, named, key, tensor)]
    read(wanted)
    return known, fresh


def set_updates(optimizer: MegatronOptimizer, updates: int) -> None:
    """Set the number of updates by which AdamW corrects its moments' bias."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"].fill_(updates)
        else:  # Apex's and Transformer Engine's count by group
            for group in part.param_groups:
                group["step"] = updates


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
            yield _Owned(parameter, kept, inside.start, replicated=False)
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


def _blocks(one: _Owned, named: Named, key: str, tensor: torch.Tensor) -> Iterator[ShardedTensor]:
    """State `key` of a parameter as blocks of tensors of the checkpoint; their data are views of `tensor`."""
    flat = tensor.view(-1)
    end = one.start + len(flat)
    for shard, first in _shards_of(named[one.parameter]):
        taken = max(one.start - first, 0)
        for offsets, sizes in blocks_of(shard.local_shape, taken, min(end - first, math.prod(shard.local_shape))):
            place, taken = first + taken - one.start, taken + math.prod(sizes)
            yield replace(
                shard,
                key=_tensor_name(shard, key),
                data=flat[place : place + math.prod(sizes)].view(sizes),
                dtype=tensor.dtype,
                local_shape=sizes,
                global_offset=tuple(map(operator.add, shard.global_offset, offsets)),
                axis_fragmentations=None,  # no regular grid
            )


def _by_parameter(model_state: dict[str, Any]) -> Named:
    return {sharded.data: sharded for sharded in nested_values(model_state)}


def _shards_of(sharded: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """Shards of which this rank's parameter is made, and where each begins in the flattened parameter."""
    if isinstance(sharded, ShardedTensor):
        yield _without_layers(sharded), 0
        return
    built = replace(sharded, data=torch.empty(sharded.data.shape, device="meta")).build()
    for shard in nested_values(built):  # SwiGLU's halves
        assert shard.data.is_contiguous()
        yield _without_layers(shard), shard.data.storage_offset()


def _tensor_name(shard: ShardedTensor, key: str) -> str:
    return f"{_PREFIX}.{key}.{shard.key}"


def _without_layers(sharded: ShardedTensor) -> ShardedTensor:
    """The same place, with the layer in the tensor's name rather than in its first dimension."""
    if not sharded.prepend_axis_num:
        return sharded
    assert sharded.prepend_axis_num == 1
    layer = sharded.global_offset[0]
    return replace(
        sharded,
        key=_LAYERS.sub(f"{layer}.", sharded.key, count=1),
        global_shape=sharded.global_shape[1:],
        global_offset=sharded.global_offset[1:],
        axis_fragmentations=None,
        prepend_axis_num=0,
    )

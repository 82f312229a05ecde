"""Linears of Megatron-core whose forward product and input gradient are computed in FP8.

Tokens, output channels and the gradients of tokens have a scale each (`dash_kernels.fp8`), found anew at every call.
Weights stay as they are, and so does the product that gives their gradient: it is that of Megatron-core, with the same
hooks. Knows tensor parallelism and shards of the sequence; does not know layers.

E4M3 holds gradients as well: a scale for each token takes up the range between tokens, for which a scale for a whole
tensor needs E5M2 with half the precision. The recipe is torchao's `ROWWISE_WITH_GW_HP`
(https://docs.pytorch.org/ao/main/api_reference/generated/torchao.float8.Float8LinearRecipeName.html), except that the
transposed weight has a scale for each input channel. Casts of weights are not kept: an optimizer writes weights through
buffers of its own, which no version counter shows, and casting again costs little (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute
from torch.autograd.function import once_differentiable

from dash_dist.megatron.unread import LastLinear
from dash_kernels.fp8 import cast_rows, scaled_product

_LEAST_CAPABILITY = (8, 9)


def check_device(device: torch.device) -> None:
    """Refuse a GPU without FP8 matrix units; on CPUs the numbers are cast, and multiplied in float32.

    Raises:
        ValueError: the GPU's compute capability is below 8.9.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise ValueError(
            f"parallel.fp8_linears needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: set parallel.fp8_linears to "
            "false"
        )


def product(input_: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply [..., in] by the transpose of a weight [out, in], in FP8; returns [..., out]."""
    return _scaled(input_, weight, fast=True)


def gradient_of_input(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply the gradient of an output, [..., out], by a weight [out, in], in FP8; returns [..., in].

    Sums are float32 ones: the error of a gradient goes into all layers below.
    """
    return _scaled(gradient, weight.t(), fast=False)


def _scaled(rows: torch.Tensor, columns: torch.Tensor, *, fast: bool) -> torch.Tensor:
    found = scaled_product(cast_rows(rows.flatten(0, -2)), cast_rows(columns), rows.dtype, fast=fast)
    return found.view(*rows.shape[:-1], len(columns))


class _Fp8(torch.nn.Module):
    """The products of a linear of Megatron-core in FP8, to be inherited before it."""

    def _forward_impl(
        self,
        *,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_of_other_products: Any,
    ) -> torch.Tensor:
        output: torch.Tensor = _Product.apply(input, weight, tp_group, sequence_parallel, allreduce_dgrad)
        return output if bias is None else output + bias

    def gradient_of_input(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As for `LastLinear`."""
        return gradient_of_input(gradient, weight)


class Fp8ColumnLinear(_Fp8, ColumnParallelLinear):
    """A linear whose outputs are cut over tensor parallelism."""


class Fp8RowLinear(_Fp8, RowParallelLinear):
    """A linear whose inputs are cut over tensor parallelism."""


class LastFp8Linear(_Fp8, LastLinear):
    """Such a linear at the end of a part of a layer, see `LastLinear`."""


class _Product(torch.autograd.Function):
    """Stand for both of Megatron-core's functions of a linear, with a trained and with a frozen weight.

    Args:
        group: tensor-parallel ranks.
        shards: the input is this rank's shard of the sequence, which is gathered; its gradient is scattered.
        sums: every rank has the whole input, whose gradient is summed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_: torch.Tensor,
        weight: torch.Tensor,
        group: dist.ProcessGroup | None,
        shards: bool,
        sums: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(input_ if weight.requires_grad else None, weight)
        ctx.group, ctx.shards, ctx.sums = group, shards, sums
        if shards:
            assert group is not None
            input_, gathering = _start_gathering(input_, group)
            gathering.wait()
        return product(input_, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_, weight = ctx.saved_tensors
        gathering = None
        if ctx.shards and input_ is not None:
            input_, gathering = _start_gathering(input_, ctx.group)
        of_input = gradient_of_input(gradient, weight)
        if gathering is not None:
            gathering.wait()
        summing = None
        if ctx.shards:
            shard = of_input.new_empty(len(of_input) // ctx.group.size(), *of_input.shape[1:])
            summing = dist.reduce_scatter_tensor(shard, of_input, group=ctx.group, async_op=True)
        elif ctx.sums:
            shard = of_input
            summing = dist.all_reduce(shard, group=ctx.group, async_op=True)
        else:
            shard = of_input
        of_weight = None
        if input_ is not None:
            rows, inputs = prepare_input_tensors_for_wgrad_compute(gradient, input_)
            of_weight = rows.t().matmul(inputs)
        if summing is not None:
            summing.wait()
        return shard, of_weight, None, None, None


def _start_gathering(shard: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Begin to gather shards of the sequence into Megatron-core's buffer for them."""
    whole = get_global_memory_buffer().get_tensor([len(shard) * group.size(), *shard.shape[1:]], shard.dtype, "mpu")
    return whole, dist.all_gather_into_tensor(whole, shard, group=group, async_op=True)

"""Results of a recomputation that nobody reads, and that are therefore left out.

A part of a layer is recomputed for its gradients alone. Its last product needs its input and its weight for them, and
the residual addition after it needs nothing, so neither is computed. Both are NaN then, which shows who reads them.
Knows autograd and Megatron-core's row-parallel linear; does not know layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute
from torch.autograd.function import once_differentiable

from dash_dist.config.parallel import RecomputeModule
from dash_dist.megatron.layer_config import LayerConfig


def is_recomputation() -> bool:
    """Tell whether a forward pass with gradients runs inside a backward pass."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


def unread(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """NaN of a shape, with the type and device of `like`: a view of one number, which takes no memory."""
    return like.new_full((1,) * len(shape), math.nan).expand(shape)


def is_unread(config: LayerConfig, part: RecomputeModule) -> bool:
    """Tell whether the end of a part is being computed again and nobody reads it."""
    return config.ends_recomputation(part) and is_recomputation()


def unread_sum(residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Stand for the sum of two tensors of one shape: gives both its gradient, and is NaN."""
    total: torch.Tensor = _UnreadSum.apply(residual, branch)
    return total


class LastLinear(RowParallelLinear):
    """The linear at the end of a part of a layer, which multiplies once although the part is recomputed.

    Tensor-parallel ranks do not sum their outputs a second time either.

    Args:
        part: that it ends; the layer adds its output to the residual stream, and no norm reads it.
    """

    config: LayerConfig

    def __init__(self, *args: Any, part: RecomputeModule, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.part = part

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply this rank's part of the input, [s, b, in / tp]; returns the output and the bias to add.

        The output is [s, b, out]; with sequence parallelism this rank's [s / tp, b, out].
        """
        if is_unread(self.config, self.part):
            group = self.tp_group if self.sequence_parallel else None
            return _UnreadProduct.apply(input_, self.weight, group, self.gradient_of_input), self.bias
        found: tuple[torch.Tensor, torch.Tensor | None] = super().forward(input_)
        return found

    def gradient_of_input(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply the gradient of an output, [..., out], by the weight [out, in]; returns [..., in]."""
        return gradient.matmul(weight)


class _UnreadProduct(torch.autograd.Function):
    """Gradients of Megatron-core's linears, with and without a frozen weight.

    group: tensor-parallel ranks that the output is split over along the sequence; None where each has all of it.
    of_input: gradient of the output and weight -> gradient of the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_: torch.Tensor,
        weight: torch.Tensor,
        group: dist.ProcessGroup | None,
        of_input: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(input_ if weight.requires_grad else None, weight)
        ctx.group, ctx.of_input = group, of_input
        shards = 1 if group is None else group.size()
        return unread(input_, torch.Size((len(input_) // shards, *input_.shape[1:-1], len(weight))))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input_, weight = ctx.saved_tensors
        if ctx.group is not None:
            gradient = gather_from_sequence_parallel_region(gradient, group=ctx.group)
        of_input = ctx.of_input(gradient, weight)
        if input_ is None:
            return of_input, None, None, None
        rows, inputs = prepare_input_tensors_for_wgrad_compute(gradient, input_)
        return of_input, rows.t().matmul(inputs), None, None


class _UnreadSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return unread(residual, residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient

"""All-gather of tensors by chunk, whose gradients are summed at the chunks' owners.

Knows shards and the two collectives; does not know the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dash_dist.context_parallel.errors import exchange_errors
from dash_dist.context_parallel.shard import Shard, gather_shards
from dash_kernels.spec import accumulation_dtype


def gather_chunks(x: torch.Tensor, shard: Shard, name: str) -> torch.Tensor:
    """Gather x [B, chunks_per_rank, ...] of every rank into [B, n, ...] of the whole sequence, by chunk id.

    A collective call, as is its backward pass, which sums the ranks' gradients in float32, or float64 for float64.

    Args:
        name: of the tensors, for errors.

    Raises:
        ExchangeError: a rank of the group died, or did not answer within the group's timeout.
    """
    gathered: torch.Tensor = _GatherChunks.apply(x, shard, name)
    return gathered


class _GatherChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shard: Shard, name: str) -> torch.Tensor:
        ctx.call = shard, name
        with exchange_errors(shard.group, name):
            in_rank_order = gather_shards(x, shard.group).transpose(0, 1).flatten(1, 2)
        return in_rank_order[:, shard.gathered_chunks.slots_by_id(in_rank_order.shape[1], x.device)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        shard, name = ctx.call
        ids = shard.gathered_chunks.on(grad.device)[0]
        in_rank_order = grad[:, ids].to(accumulation_dtype(grad.dtype)).unflatten(1, (shard.size, -1))
        by_rank = in_rank_order.transpose(0, 1).contiguous()  # [size, B, chunks_per_rank, ...]
        own = torch.empty_like(by_rank[0])
        with exchange_errors(shard.group, f"gradients of {name}"):
            dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=shard.group)
        return own.to(grad.dtype), None, None

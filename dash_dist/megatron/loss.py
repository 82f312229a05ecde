"""The loss of one micro-batch at one rank, as a sum or by position, and its likeliest next tokens.

Knows the mask; does not know over how many tokens the sum becomes a mean.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dash_dist.megatron.shard_batch import ShardBatch


def loss_of_batch(shards: Iterator[ShardBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """The forward step of Megatron-core's schedules: the next batch's output, and what makes its loss of that."""
    shard = next(shards)
    output = model(
        shard.tokens,
        None,
        None,
        labels=shard.labels,
        loss_mask=shard.loss_mask,
        packed_seq_params=shard.documents,
    )
    return output, functools.partial(_summed_loss, shard.loss_mask)


def bucket_losses_of_batch(
    edges: Sequence[int], shards: Iterator[ShardBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """A forward step as `loss_of_batch` that reports `bucket_losses`."""
    shard = next(shards)
    output = model(shard.tokens, None, None, labels=shard.labels, packed_seq_params=shard.documents)
    return output, functools.partial(_summed_by_bucket, shard, edges)


def next_tokens_of_batch(shards: Iterator[ShardBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """A forward step whose data is the next token where the batch's `loss_mask` asks for it, [b, s], 0 elsewhere."""
    shard = next(shards)
    output = model(shard.tokens, None, None, loss_mask=shard.loss_mask, packed_seq_params=shard.documents)
    return output, lambda tokens, non_loss_data: tokens


def bucket_losses(shard: ShardBatch, token_losses: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """Return, for each bucket of positions, the summed `token_losses` [b, s] and its tokens, float64 [buckets, 2]."""
    rows = []
    for start, end in itertools.pairwise((0, *edges)):
        inside = shard.loss_mask & (shard.positions >= start) & (shard.positions < end)
        total = torch.where(inside, token_losses.double(), 0.0).sum()
        rows.append(torch.stack([total, inside.sum(dtype=torch.float64)]))
    return torch.stack(rows)


def summed_loss(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> torch.Tensor:
    """Sum of `token_losses` where `loss_mask`, both [b, s]; a scalar."""
    # where, not a product: the loss of a masked token may be anything.
    return torch.where(loss_mask, token_losses, 0.0).sum()


def _summed_loss(loss_mask: torch.Tensor, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return loss, loss_mask.sum(dtype=torch.int32), loss.detach()


def _summed_by_bucket(
    shard: ShardBatch, edges: Sequence[int], token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses = bucket_losses(shard, token_losses, edges)
    return losses[:, 0].sum(), losses[:, 1].sum().int(), losses

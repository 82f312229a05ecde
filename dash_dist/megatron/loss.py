"""The loss of one micro-batch at one rank.

Knows the mask; does not know over how many tokens the sum becomes a mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from dash_dist.megatron.shard_batch import ShardBatch


def loss_of_batch(shards: Iterator[ShardBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """The forward step of Megatron-core's schedules: the next batch's output, and what makes its loss of that."""
    shard = next(shards)
    output = model(shard.tokens, None, None, labels=shard.labels, packed_seq_params=shard.documents)
    return output, functools.partial(_summed_loss, shard.loss_mask)


def summed_loss(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> torch.Tensor:
    """Sum of `token_losses` where `loss_mask`, both [b, s]; a scalar."""
    # where, not a product: the loss of a masked token may be anything.
    return torch.where(loss_mask, token_losses, 0.0).sum()


def _summed_loss(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = summed_loss(loss_mask, token_losses)
    return loss, loss_mask.sum(dtype=torch.int32), loss.detach()

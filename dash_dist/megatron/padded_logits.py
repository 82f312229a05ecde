"""The columns of the logits that stand for no token.

Knows the rows of the output layer and their division over tensor parallelism. Does not know the loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def own_tokens(vocab_size: int, rows: int, tp_rank: int) -> int:
    """The number of tokens in a tensor-parallel rank's `rows` of the output layer; padding follows them.

    It is 0 at a rank that holds nothing but padding.
    """
    return min(max(vocab_size - tp_rank * rows, 0), rows)


def exclude_padding(logits: torch.Tensor, tokens: int) -> torch.Tensor:
    """Set the columns from `tokens` on to -inf, in place: a softmax gives them probability and gradient 0.

    Only those columns are written, and the backward pass touches nothing.

    Args:
        logits: [..., rows], of this rank's rows of the output layer; no other graph may need its values.
        tokens: from `own_tokens`.

    Returns:
        `logits`.
    """
    if tokens == logits.shape[-1]:
        return logits
    excluded: torch.Tensor = _ExcludePadding.apply(logits, tokens)
    return excluded


class _ExcludePadding(torch.autograd.Function):
    """Assignment whose backward pass relies on the gradient being 0 where it wrote.

    Autograd's own indexed assignment would copy the gradient of all columns to clear those.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: int) -> torch.Tensor:
        logits[..., tokens:] = -math.inf
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None

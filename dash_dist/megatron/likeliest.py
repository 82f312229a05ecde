"""The likeliest token, where the logits are cut over tensor parallelism.

Knows the logits of some positions; does not know where they come from.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist


def likeliest_tokens(logits: torch.Tensor, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """Return the token of the largest logit of each row, the lowest id among equals; NaN counts as the smallest.

    A collective over the group, which exchanges two numbers a row and rank.

    Args:
        logits: [n, vocab / tp], of this rank's tokens; -inf in columns that stand for no token.
        tp_group: ranks in the order of their tokens.

    Returns:
        [n] int64, the same at every rank of the group.
    """
    rows, columns = logits.shape
    logits = logits.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    largest = logits.amax(dim=1)
    ids = torch.arange(columns, device=logits.device)
    tokens = torch.where(logits == largest[:, None], ids, columns).amin(dim=1) + tp_group.rank() * columns
    if tp_group.size() == 1:
        return tokens
    all_largest = logits.new_empty(tp_group.size(), rows)
    all_tokens = tokens.new_empty(tp_group.size(), rows)
    dist.all_gather(list(all_largest.unbind()), largest, group=tp_group)
    dist.all_gather(list(all_tokens.unbind()), tokens, group=tp_group)
    among_largest = all_largest == all_largest.amax(dim=0)
    return torch.where(among_largest, all_tokens, tp_group.size() * columns).amin(dim=0)

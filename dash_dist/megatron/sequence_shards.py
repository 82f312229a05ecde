"""The residual stream in shards along the sequence, one at each tensor-parallel rank, as the output layer takes it.

Knows which tokens a rank's shard holds; does not know layers nor losses.

With sequence parallelism (Korthikanti et al., https://arxiv.org/abs/2205.05198) rank r of tp holds the r-th of tp equal
parts of the tokens of its context-parallel rank wherever a token is computed alone. A projection gathers what all of
them hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region


def pieces_of_shards(
    hidden: torch.Tensor, labels: torch.Tensor, shards: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut this rank's shard into pieces, each with the labels of the same piece of all shards.

    Args:
        hidden: [s / shards, b, hidden].
        labels: [b, s].
        rows: of a piece; the last one may be shorter.

    Returns:
        Pieces [rows, b, hidden], and [b, shards x rows] in the order in which the gathered pieces follow each other.
    """
    by_shard = labels.unflatten(1, (shards, -1))
    for piece, targets in zip(hidden.split(rows), by_shard.split(rows, dim=2), strict=True):
        yield piece, targets.flatten(1)


def join_pieces(losses: Sequence[torch.Tensor], shards: int) -> torch.Tensor:
    """Put losses [b, shards x rows] of gathered pieces back into the order of the sequence, [b, s]."""
    return torch.cat([piece.unflatten(1, (shards, -1)) for piece in losses], dim=2).flatten(1)


def shard_of_marked(hidden: torch.Tensor, marked: torch.Tensor, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """Divide the marked rows of all shards evenly over the ranks. A collective over the group.

    Args:
        hidden: [s / tp, b, hidden], this rank's shard.
        marked: [b, s], the same at every rank.
        tp_group: ranks in the order of their shards.

    Returns:
        [n / tp rounded up, hidden]. Gathered, the first n rows are those of `hidden.transpose(0, 1)[marked]` of the
        whole sequence; zeros follow, at least one row a rank in all.
    """
    first, tokens = tp_group.rank() * hidden.shape[0], hidden.shape[0]
    sequences, positions = marked.nonzero(as_tuple=True)
    here = (positions >= first) & (positions < first + tokens)
    each = max(1, -(-len(positions) // tp_group.size()))
    rows = hidden.new_zeros(each * tp_group.size(), hidden.shape[2])
    rows[here.nonzero()[:, 0]] = hidden[positions[here] - first, sequences[here]]
    shard: torch.Tensor = reduce_scatter_to_sequence_parallel_region(rows, group=tp_group)
    return shard

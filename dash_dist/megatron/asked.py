"""Rows whose next tokens are asked for, dealt out over data parallelism and put together again.

Knows which rank computes which row. Does not know the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dash_dist.distributed.agreement import Agreement
from dash_dist.engine.batch import BatchError
from dash_dist.engine.protocol import MOST_POSITIONS
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.shard_batch import ShardBatch


@dataclass(frozen=True)
class AskedRow:
    """One row, [1, T], as a `MicroBatch` whose mask marks the positions whose next tokens are asked for."""

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: None = None

    @property
    def labels(self) -> torch.Tensor:
        """The tokens themselves: nothing is learned from the row."""
        return self.tokens


class AskedRows:
    """The rows and positions of one call of `Engine.next_tokens`.

    A data-parallel rank computes rows `dp_rank`, `dp_rank + dp_size` and so on. Where rows are missing in the last
    round, ranks compute the last row once more: some engines need as many forward passes at every rank.

    Raises:
        BatchError: at every rank: the shapes or positions of some rank cannot be.
    """

    def __init__(self, tokens: torch.Tensor, positions: torch.Tensor, dims: ParallelDims) -> None:
        Agreement().raise_first(_find_problem(tokens, positions))
        self._positions, self._dims = positions, dims
        rounds = range(dims.dp_rank, -(-len(tokens) // dims.dp_size) * dims.dp_size, dims.dp_size)
        self._own = [row if row < len(tokens) else None for row in rounds]
        self.micro_batches = [
            _asked_row(tokens[[row]], positions[row])
            for row in (len(tokens) - 1 if own is None else own for own in self._own)
        ]

    def gather(self, found: Sequence[torch.Tensor], shards: Sequence[ShardBatch]) -> torch.Tensor:
        """Return the tokens at the positions that were asked for, [N, P] on the CPU. A collective: all ranks call it.

        Args:
            found: [1, s] for each of this rank's shards, 0 where nothing was asked; empty before the last stage.
            shards: of `micro_batches`.
        """
        dims = self._dims
        table = torch.zeros(self._positions.shape, dtype=torch.int64, device=dims.device)
        if dims.is_last_stage and dims.tp_rank == 0:
            for row, tokens, shard in zip(self._own, found, shards, strict=True):
                if row is not None:
                    whole = tokens.new_zeros(dims.cp_size * tokens.shape[1])
                    whole[shard.positions] = tokens[0]
                    table[row] = whole[self._positions[row].to(dims.device)]
        dist.all_reduce(table)  # every position is one rank's, and 0 at the others
        return table.cpu()


def _find_problem(tokens: torch.Tensor, positions: torch.Tensor) -> BatchError | None:
    if tokens.dim() != 2 or positions.dim() != 2 or len(tokens) != len(positions) or not positions.numel():
        shapes = f"{list(tokens.shape)} tokens and {list(positions.shape)} positions"
        return BatchError(f"{shapes} were given: give [N, T] and [N, P], with N and P above 0")
    if positions.shape[1] > MOST_POSITIONS:
        return BatchError(f"{positions.shape[1]} positions were asked for in a row: ask for at most {MOST_POSITIONS}")
    if not 0 <= int(positions.min()) <= int(positions.max()) < tokens.shape[1]:
        return BatchError(
            f"positions from {int(positions.min())} to {int(positions.max())} were asked for in rows of "
            f"{tokens.shape[1]} tokens: give positions from 0 to {tokens.shape[1] - 1}"
        )
    return None


def _asked_row(tokens: torch.Tensor, positions: torch.Tensor) -> AskedRow:
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, positions] = True
    return AskedRow(tokens, mask)

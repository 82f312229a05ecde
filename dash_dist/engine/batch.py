"""Micro-batches of one step, checked to be the same wherever they must be.

Knows which ranks must agree. Does not know where batches come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from dash_dist.engine.ranks import Dims


class MicroBatch(Protocol):
    """Whole sequences of one data-parallel rank, [micro_batch_size, T] each.

    Attributes:
        tokens: int64.
        labels: int64, already shifted: labels[:, t] follows tokens[:, t].
        loss_mask: bool, or 0 and 1; whether labels[:, t] counts in the loss.
        cu_seqlens: None where attention may go back to the beginning of the sequence. For documents packed into one
            sequence, micro_batch_size 1, whose attention ends at their borders: int32 [documents + 1] on the CPU, where
            document i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1 of the whole sequence, whole chunks each.
    """

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def loss_mask(self) -> torch.Tensor: ...
    @property
    def cu_seqlens(self) -> torch.Tensor | None: ...


class BatchError(ValueError):
    """The micro-batches that the ranks were given make no step."""


def count_loss_tokens(
    micro_batches: Sequence[MicroBatch],
    dims: Dims,
    *,
    sequence_length: int,
    vocab_size: int,
    chunk_size: int,
) -> int:
    """Check one step's micro-batches against each other over all ranks. A collective: all ranks call it.

    Returns:
        Tokens of the global batch that count in its loss.

    Raises:
        BatchError: at every rank: some rank's micro-batches are malformed, their number or size differs between
            ranks, ranks of one data-parallel index hold different data, or no token counts in the loss.
    """
    problem = _find_problem(micro_batches, sequence_length, vocab_size, chunk_size)
    row = torch.zeros(6, dtype=torch.int64)
    row[0], row[1] = problem is not None, dims.dp_rank
    if problem is None:
        row[2], row[3] = len(micro_batches), micro_batches[0].tokens.shape[0]
        row[4] = sum(int(batch.loss_mask.sum()) for batch in micro_batches)
        row[5] = _fingerprint(micro_batches)
    row = row.to(dims.device)
    rows = [torch.empty_like(row) for _ in range(dims.world_size)]
    dist.all_gather(rows, row)
    table = torch.stack(rows).cpu()

    if problem is not None:
        raise BatchError(problem)
    malformed = table[:, 0].nonzero().flatten().tolist()
    if malformed:
        raise BatchError(f"ranks {malformed} were given malformed micro-batches: their own errors say how")
    if (table[:, 2:4] != table[0, 2:4]).any():
        given = {rank: f"{n} of {size} sequences" for rank, (n, size) in enumerate(table[:, 2:4].tolist())}
        raise BatchError(f"ranks were given different micro-batches: {given}: give every rank the same number and size")
    tokens = 0
    for dp_rank in range(dims.dp_size):
        same = table[table[:, 1] == dp_rank]
        if (same[:, 5] != same[0, 5]).any():
            ranks = (table[:, 1] == dp_rank).nonzero().flatten().tolist()
            raise BatchError(
                f"ranks {ranks} share data-parallel index {dp_rank} and were given different sequences: "
                "read the data by ParallelDims.dp_rank, not by the rank"
            )
        tokens += int(same[0, 4])
    if tokens == 0:
        raise BatchError("loss_mask is 0 for every token of the global batch: there is nothing to learn from it")
    return tokens


def _find_problem(
    micro_batches: Sequence[MicroBatch], sequence_length: int, vocab_size: int, chunk_size: int
) -> str | None:
    if not micro_batches:
        return "no micro-batch was given: a step needs at least one"
    shape = (micro_batches[0].tokens.shape[0], sequence_length)
    for index, batch in enumerate(micro_batches):
        for name in ("tokens", "labels", "loss_mask"):
            tensor: torch.Tensor = getattr(batch, name)
            if tuple(tensor.shape) != shape:
                return f"micro-batch {index}: {name} is {list(tensor.shape)}, expected {list(shape)}"
        mask = batch.loss_mask
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            return f"micro-batch {index}: loss_mask has values other than 0 and 1: a token counts or not"
        for name, ids in (("tokens", batch.tokens), ("labels", batch.labels[mask.bool()])):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                return (
                    f"micro-batch {index}: {name} range from {int(ids.min())} to {int(ids.max())}, and the "
                    f"vocabulary has {vocab_size} tokens: use the model's own tokenizer"
                )
        if batch.cu_seqlens is not None:
            reason = _find_problem_of_documents(batch.cu_seqlens, shape, chunk_size)
            if reason is not None:
                return f"micro-batch {index}: cu_seqlens {reason}"
    return None


def _find_problem_of_documents(cu_seqlens: torch.Tensor, shape: tuple[int, int], chunk_size: int) -> str | None:
    size, sequence_length = shape
    if size != 1:
        return f"is given for {size} sequences: packed documents need micro-batches of one sequence"
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        return f"is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: give torch.int32 [documents + 1]"
    if cu_seqlens.device.type != "cpu":
        return f"is on {cu_seqlens.device}: leave it on the CPU, where it is read"
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != sequence_length:
        return (
            f"goes from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}: "
            f"its entries must go from 0 to the sequence length, {sequence_length}"
        )
    if (cu_seqlens.diff() < 0).any():
        return "decreases: its entries are where each document begins, in order"
    partial = cu_seqlens[cu_seqlens % chunk_size != 0]
    if len(partial):
        return f"has the border {int(partial[0])}: pad documents to whole chunks, {chunk_size} tokens each"
    return None


def _fingerprint(micro_batches: Sequence[MicroBatch]) -> int:
    """A 64-bit sum that differs, in all likelihood, where any token, label, mask or border differs or moves."""
    total = 0
    for batch in micro_batches:
        borders = torch.zeros(0) if batch.cu_seqlens is None else batch.cu_seqlens
        weights = torch.arange(1, 2 * max(batch.tokens.numel(), borders.numel()), 2)
        for tensor in (batch.tokens, batch.labels, batch.loss_mask, borders):
            total = total * 1_000_003 + int((tensor.cpu().long().flatten() * weights[: tensor.numel()]).sum())
    return total % 2**63

"""Blocks: K and V of one chunk of one KV head, taken out of a shard's tensors and added back into their gradients.

Knows memory; does not know ranks. The `places` of blocks are int64 [3, blocks]: the index in the batch, the slot in the
shard and the KV head of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(k: torch.Tensor, v: torch.Tensor, places: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Copies blocks of k and v [B, S, Hkv, D], strided as they may be, into a new [blocks, 2, C, D]."""
    packed = k.new_empty(places.shape[1], 2, chunk_size, k.shape[-1])
    for i, x in enumerate((k, v)):
        chunks = _in_words(x).unflatten(1, (-1, chunk_size)).transpose(2, 3)  # [B, slots, Hkv, C, D]
        # The gather writes where the blocks belong, without a copy in between.
        torch.ops.aten.index.Tensor_out(chunks, list(places), out=packed.view(chunks.dtype)[:, i])
    return packed


def add(
    gradient: torch.Tensor, contributions: torch.Tensor, places: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """Adds contributions [blocks, 2, C, D] to gradient [2, B, S, Hkv, D], contiguous, in place, and returns it.

    They come in runs of counts[i] blocks, and are added run by run. No block is in a run twice, so that every number is
    added to in the order of the runs: the result is the same bits in every run of the program.
    """
    _, batch, tokens, heads, head_dim = gradient.shape
    chunk_size = contributions.shape[2]
    index, slot, head = places
    first_rows = ((index * tokens + slot * chunk_size) * heads + head)[:, None, None]
    of_tensor = torch.arange(2, device=places.device)[:, None] * (batch * tokens * heads)
    of_token = torch.arange(chunk_size, device=places.device) * heads
    rows = first_rows + of_tensor + of_token  # [blocks, 2, C], in the gradient's rows of D numbers
    runs = zip(rows.flatten(1).split(counts), contributions.split(counts), strict=True)
    for rows_of_run, contribution in runs:
        if len(rows_of_run):
            gradient.view(-1, head_dim).index_add_(0, rows_of_run.flatten(), contribution.view(-1, head_dim))
    return gradient


def _in_words(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as the same memory in 8-byte words where it divides so: copied by number, 16-bit floats are slow."""
    numbers = 8 // x.itemsize
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.view(torch.int64) if x.stride(-1) == 1 and not any(step % numbers for step in steps) else x

"""Packing of blocks from a shard's tensors, and adding them into its gradients.

Knows memory; does not know ranks. A block is K and V of one chunk of one KV head. `places` are int64 [3, blocks]: index
in the batch, slot in the shard and KV head of each block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(k: torch.Tensor, v: torch.Tensor, places: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Copies blocks of k and v [B, S, Hkv, D], with any strides, into a new [blocks, 2, C, D]."""
    packed = k.new_empty(places.shape[1], 2, chunk_size, k.shape[-1])
    for i, x in enumerate((k, v)):
        chunks = _in_words(x).unflatten(1, (-1, chunk_size)).transpose(2, 3)  # [B, slots, Hkv, C, D]
        # Gathers directly into the packed tensor, without an intermediate copy.
        torch.ops.aten.index.Tensor_out(chunks, list(places), out=packed.view(chunks.dtype)[:, i])
    return packed


def add(
    gradient: torch.Tensor, contributions: torch.Tensor, places: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """Adds contributions [blocks, 2, C, D] to gradient [2, B, S, Hkv, D], contiguous, in place, and returns it.

    Contributions come in groups of counts[i] blocks, one per sending rank, and are added group by group. No group holds
    a block twice, so the order of every sum is fixed and the result has the same bits in every run.
    """
    _, batch, tokens, heads, head_dim = gradient.shape
    chunk_size = contributions.shape[2]
    index, slot, head = places
    first_rows = ((index * tokens + slot * chunk_size) * heads + head)[:, None, None]
    tensor_rows = torch.arange(2, device=places.device)[:, None] * (batch * tokens * heads)
    token_rows = torch.arange(chunk_size, device=places.device) * heads
    rows = first_rows + tensor_rows + token_rows  # [blocks, 2, C], in the gradient's rows of D numbers
    groups = zip(rows.flatten(1).split(counts), contributions.split(counts), strict=True)
    for group_rows, contribution in groups:
        if len(group_rows):
            gradient.view(-1, head_dim).index_add_(0, group_rows.flatten(), contribution.view(-1, head_dim))
    return gradient


def _in_words(x: torch.Tensor) -> torch.Tensor:
    """View of x [..., D] in 8-byte words if its strides allow: index copies 16-bit floats slowly, one by one."""
    numbers = 8 // x.itemsize
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.view(torch.int64) if x.stride(-1) == 1 and not any(step % numbers for step in steps) else x

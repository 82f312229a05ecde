"""Where the kernels find K and V: all heads of some chunks in one tensor, or single blocks from anywhere.

Both are rows of D numbers. In a `Part` the rows of a token's KV heads follow each other; in `Blocks` the rows of a
chunk of one head do. A kernel gets the first row of every chunk from a table, and from `BLOCKS` how far apart rows are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dash_kernels.spec import Blocks, Part
from dash_kernels.triton.launch import LaunchOptions
from dash_kernels.triton.tiles import TileShape, chunk_offsets


@dataclass(frozen=True)
class KeyRows:
    """K and V of a part, as the kernels address them.

    k, v:   contiguous rows, [B, S, Hkv, D] or [rows, D].
    starts: int32 [n], or [B x Hkv, n] for blocks: the token or row at which a chunk starts, -1 where the part lacks it.
    tokens: S, the tokens of a sequence of the batch; not read for blocks.
    """

    k: torch.Tensor
    v: torch.Tensor
    starts: torch.Tensor
    tokens: int
    blocks: bool

    @classmethod
    def of(cls, part: Part | Blocks, of_summaries: torch.Size, tile: TileShape) -> KeyRows:
        """of_summaries: [B, n, Hkv, D], the shape of the whole sequence's summaries."""
        batch, n, heads, _ = of_summaries
        if isinstance(part, Part):
            starts = part.chunks.starts_by_id(n, part.k.device)
            return cls(part.k.contiguous(), part.v.contiguous(), starts, part.k.shape[1], blocks=False)
        kv = part.kv
        if len(kv) == 0:  # nothing will be read, but a tensor map needs a tensor
            kv = kv.new_zeros(1, *kv.shape[1:])
        rows = kv.flatten(0, 2)
        starts = torch.full((batch * heads * n,), -1, dtype=torch.int32, device=kv.device)
        step = 2 * tile.chunk_size
        end = step * len(part.addresses)
        starts[part.addresses] = torch.arange(0, end, step, dtype=torch.int32, device=kv.device)
        return cls(rows, rows[tile.chunk_size :], starts, 0, blocks=True)

    @property
    def aligned(self) -> bool:
        """Return whether a tensor map can be made of K and V."""
        return self.k.data_ptr() % 16 == 0 and self.v.data_ptr() % 16 == 0

    def maps(
        self, tile: TileShape, options: LaunchOptions
    ) -> tuple[torch.Tensor | TensorDescriptor, torch.Tensor | TensorDescriptor, bool]:
        """(tensor map of K, of V, True), a chunk of one head at a time; (K, V, False) where they are loaded by address:
        tensor maps take powers of two and addresses that are multiples of 16 bytes.
        """
        k, v = self.k, self.v
        sizes = tile.head_dim == tile.padded_dim and tile.chunk_size == triton.next_power_of_2(tile.chunk_size)
        if not (options.tensor_maps and sizes and self.aligned):
            return k, v, False
        block = [tile.chunk_size, tile.head_dim]
        width = tile.head_dim if self.blocks else tile.kv_heads * tile.head_dim
        k_map, v_map = (TensorDescriptor.from_tensor(x.view(-1, width), block) for x in (k, v))
        return k_map, v_map, True


@triton.jit
def starts_of(starts_ptr, batch_head, n, BLOCKS: tl.constexpr):
    """The row of `KeyRows.starts` of a KV head."""
    row = starts_ptr
    if BLOCKS:
        row = starts_ptr + batch_head.to(tl.int64) * n
    return row


@triton.jit
def key_offsets(
    start, length, batch_head, S,
    HK: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(offsets, mask) of a chunk's rows in K or V, and in their gradients.  [BC, BD] each"""
    if BLOCKS:
        place = tl.arange(0, BC)
        column = tl.arange(0, BD)
        offsets = (start + place).to(tl.int64)[:, None] * D + column[None, :]
        mask = (place < length)[:, None] & (column < D)[None, :]
    else:
        offsets, mask = chunk_offsets(start, length, batch_head, S, HK, BC, D, BD)
    return offsets, mask


@triton.jit
def load_own_keys(
    k_ptr, v_ptr, start, length, batch_head, S,
    HK: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(K, V) of a chunk that may be incomplete, zeros beyond its length.  [BC, BD] each"""
    offsets, mask = key_offsets(start, length, batch_head, S, HK, BC, D, BD, BLOCKS)
    return tl.load(k_ptr + offsets, mask=mask, other=0.0), tl.load(v_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_keys(
    k_ptr, v_ptr, k_map, v_map, start, batch_head, S,
    HK: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MAPS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """(K, V) of a complete chunk that starts at a token or row.  [BC, BD] each"""
    if MAPS:
        row = start
        column = 0
        if not BLOCKS:
            row += (batch_head // HK) * S
            column += (batch_head % HK) * D
        k = k_map.load([row, column])
        v = v_map.load([row, column])
    else:
        k, v = load_own_keys(k_ptr, v_ptr, start, C, batch_head, S, HK, BC, D, BD, BLOCKS)
    return k, v

"""What routing's bits say about all queries together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, Routing

WORDS, TILES, PROGRAMS = 64, 32, 64  # of a program's step, and how many programs share the tiles


def reached(routing: Routing, query_chunks: ChunkGrid, n: int, spec: AttentionSpec) -> torch.Tensor:
    batch, heads, tiles, words = routing.masks.shape
    device = routing.masks.device
    # Each program ORs a share of the tiles; what is left of each is small.
    shares = torch.zeros(PROGRAMS, batch * heads, words, dtype=torch.int32, device=device)
    reached_kernel[(triton.cdiv(words, WORDS), batch * heads, PROGRAMS)](
        routing.masks, query_chunks.on(device), shares, len(query_chunks), tiles, words,
        STEPS=tiles // len(query_chunks), BT=spec.chunk_size // (tiles // len(query_chunks)),
        WORDS=WORDS, TILES=TILES,
    )  # fmt: skip
    bits = (shares.unsqueeze(-1) >> torch.arange(32, device=device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :n].any(0).view(batch, heads, n)


@triton.jit(do_not_specialize=["slots", "tiles", "words"])
def reached_kernel(
    mask_ptr, grid_ptr, share_ptr, slots, tiles, words,
    STEPS: tl.constexpr, BT: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    batch_head, program, programs = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    seen = tl.zeros([WORDS], tl.int32)
    for at in range(program * TILES, tiles, programs * TILES):
        tile = at + tl.arange(0, TILES)
        slot = tile // STEPS
        chunk = tl.load(grid_ptr + slot, mask=tile < tiles, other=0)
        length = tl.load(grid_ptr + 2 * slots + slot, mask=tile < tiles, other=0)
        first = tl.load(grid_ptr + 3 * slots + slot, mask=tile < tiles, other=0)
        written = (tile % STEPS * BT < length)[:, None] & (word < words)[None, :]
        row = (batch_head.to(tl.int64) * tiles + tile) * words
        bits = tl.load(mask_ptr + row[:, None] + word[None, :], mask=written, other=0)
        # Bits outside of first <= id < chunk are not written by routing.
        bits &= _bits_below(chunk[:, None] - word[None, :] * 32) & ~_bits_below(first[:, None] - word[None, :] * 32)
        seen |= tl.reduce(bits, 0, _or)
    tl.store(
        share_ptr + (program * tl.num_programs(1) + batch_head).to(tl.int64) * words + word, seen, mask=word < words
    )


@triton.jit
def _bits_below(count):
    """A word whose `count` lowest bits are set: none below 0, all from 32 on."""
    low = (1 << tl.minimum(tl.maximum(count, 0), 31)) - 1
    return tl.where(count >= 32, -1, low)


@triton.jit
def _or(a, b):
    return a | b


def tile_efficiency(routing: Routing, query_chunks: ChunkGrid, spec: AttentionSpec) -> float:
    """Selected / walked pairs of a token and an earlier chunk: a tile walks what any of its tokens selected."""
    assert routing.masks is not None
    device = routing.masks.device
    ids, _, lengths, firsts = query_chunks.on(device).long()
    per_chunk = routing.masks.shape[2] // len(query_chunks)
    tokens = spec.chunk_size // per_chunk
    first_token = torch.arange(per_chunk, device=device) * tokens
    held = (lengths[:, None] - first_token).clamp(0, tokens).flatten()  # tokens of a tile
    word = torch.arange(routing.masks.shape[3], device=device) * 32
    walked = 0
    for bit in range(32):
        chunk = word + bit
        inside = (chunk >= firsts[:, None]) & (chunk < ids[:, None])
        on = (routing.masks >> bit) & 1
        walked += int((on * inside.repeat_interleave(per_chunk, 0)).sum(-1).mul(held).sum())
    earlier = int(routing.selected.sum(dtype=torch.int64)) - routing.selected.numel()
    return earlier / walked if walked else 1.0

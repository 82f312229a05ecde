"""Chunks that any query selected, from routing's bits."""

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
    shares = torch.empty(PROGRAMS, batch * heads, words, dtype=torch.int32, device=device)
    reached_kernel[(triton.cdiv(words, WORDS), batch * heads, PROGRAMS)](
        routing.masks, shares, tiles, words, WORDS=WORDS, TILES=TILES
    )
    bits = (shares.unsqueeze(-1) >> torch.arange(32, device=device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :n].any(0).view(batch, heads, n)


@triton.jit(do_not_specialize=["tiles", "words"])
def reached_kernel(mask_ptr, share_ptr, tiles, words, WORDS: tl.constexpr, TILES: tl.constexpr):
    batch_head, program, programs = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    seen = tl.zeros([WORDS], tl.int32)
    for at in range(program * TILES, tiles, programs * TILES):
        tile = at + tl.arange(0, TILES)
        row = (batch_head.to(tl.int64) * tiles + tile) * words
        inside = (tile < tiles)[:, None] & (word < words)[None, :]
        seen |= tl.reduce_or(tl.load(mask_ptr + row[:, None] + word[None, :], mask=inside, other=0), axis=0)
    share = (program * tl.num_programs(1) + batch_head).to(tl.int64) * words
    tl.store(share_ptr + share + word, seen, mask=word < words)


def tile_efficiency(routing: Routing, query_chunks: ChunkGrid, spec: AttentionSpec) -> float:
    """Selected / walked pairs of a token and an earlier chunk: a tile walks what any of its tokens selected."""
    lengths = query_chunks.on(routing.masks.device)[2].long()
    per_chunk = routing.masks.shape[2] // len(query_chunks)
    tokens = spec.chunk_size // per_chunk
    first_token = torch.arange(per_chunk, device=lengths.device) * tokens
    held = (lengths[:, None] - first_token).clamp(0, tokens).flatten()  # tokens of a tile
    walked = sum(int(((routing.masks >> bit) & 1).sum(-1).mul(held).sum()) for bit in range(32))
    earlier = int(routing.selected.sum(dtype=torch.int64)) - routing.selected.numel()
    return earlier / walked if walked else 1.0

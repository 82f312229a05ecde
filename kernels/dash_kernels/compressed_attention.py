"""Compressed branch of NSA: softmax attention of each query to the compressed blocks that end at or before it.

Knows documents and strides; does not know how blocks are compressed. It runs in PyTorch, a block of queries of one
document at a time, and repeats their scores in the backward pass, so that no buffer grows with the tokens times the
blocks. It is not a tuned kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dash_kernels.attention import without_autocast
from dash_kernels.chunks import ChunkGrid
from dash_kernels.selection import STRIDE
from dash_kernels.spec import AttentionSpec, accumulation_dtype

MAX_SCORES = 2**25
"""Scores of a block of queries, unless one chunk of them has more."""


def compressed_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunks: ChunkGrid, spec: AttentionSpec
) -> torch.Tensor:
    """Attention of q [B, T, Hq, D] to the compressed blocks of its documents, zeros before the first one's end.

    Args:
        keys, values: of the whole sequence, [B, n x C / 16, Hkv, D]: entry i is of the block that ends with stride i of
            the chunks in the order of their ids. That of a document's first stride is not read.
        chunks: of the queries.
        spec: with softmax_scale as a number.

    Returns:
        [B, T, Hq, D] in q's dtype.
    """
    out: torch.Tensor = _CompressedAttention.apply(q, keys, values, chunks, spec)
    return out


@dataclass(frozen=True)
class _Rows:
    """Consecutive queries of one document, and the blocks that any of them may see.

    unseen: bool [t, i].
    """

    tokens: slice
    blocks: slice
    unseen: torch.Tensor


def _rows(chunks: ChunkGrid, spec: AttentionSpec, device: torch.device, row_scores: int) -> Iterator[_Rows]:
    """Yield the queries that see any block.

    Args:
        row_scores: scores of a token and a block, over batch and heads.
    """
    per_chunk = spec.chunk_size // STRIDE
    ids, starts, lengths, firsts = chunks.on(torch.device("cpu")).tolist()
    for slots in _runs(ids, firsts):
        first = firsts[slots.start]
        available = (ids[slots.stop - 1] + 1 - first) * per_chunk
        step = max(MAX_SCORES // (row_scores * available * spec.chunk_size), 1)
        for begin in range(slots.start, slots.stop, step):
            last = min(begin + step, slots.stop) - 1
            tokens = slice(starts[begin], starts[last] + lengths[last])
            blocks = slice(first * per_chunk + 1, (ids[last] + 1) * per_chunk)
            if blocks.start == blocks.stop:
                continue
            # Chunks of a run follow one another, and only the last one may be incomplete.
            place = ids[begin] * spec.chunk_size + torch.arange(tokens.stop - tokens.start, device=device)
            ends = (torch.arange(blocks.start, blocks.stop, device=device) + 1) * STRIDE - 1
            yield _Rows(tokens, blocks, ends > place.unsqueeze(-1))


def _runs(ids: list[int], firsts: list[int]) -> Iterator[range]:
    """Slots of consecutive chunks of one document."""
    breaks = [slot for slot in range(1, len(ids)) if ids[slot] != ids[slot - 1] + 1 or firsts[slot] != firsts[slot - 1]]
    return (range(begin, end) for begin, end in itertools.pairwise([0, *breaks, len(ids)]))


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunks: ChunkGrid,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        batch, tokens, heads, _ = q.shape
        kv_heads, dtype = keys.shape[2], accumulation_dtype(q.dtype)
        out = torch.zeros_like(q)
        lse = q.new_full((batch, kv_heads, heads // kv_heads, tokens), torch.inf, dtype=dtype)
        for rows in _rows(chunks, spec, q.device, batch * heads):
            scores = _scores(q, keys, rows, spec)
            found = scores.logsumexp(-1)
            lse[..., rows.tokens] = found.masked_fill_(found == -torch.inf, torch.inf)  # weights of 0 then
            weights = (scores - lse[..., rows.tokens].unsqueeze(-1)).exp_()
            mean = torch.einsum("bhgti,bihd->bthgd", weights, values[:, rows.blocks].to(dtype))
            out[:, rows.tokens] = mean.flatten(2, 3).to(q.dtype)
        ctx.save_for_backward(q, keys, values, out, lse)
        ctx.call = chunks, spec
        return out

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, keys, values, out, lse = ctx.saved_tensors
        chunks, spec = ctx.call
        batch, _, heads, _ = q.shape
        kv_heads, dtype = keys.shape[2], lse.dtype
        dq = torch.zeros_like(q)
        dkeys, dvalues = (torch.zeros_like(x, dtype=dtype) for x in (keys, values))
        for rows in _rows(chunks, spec, q.device, batch * heads):
            upstream, queries, output = (_grouped(x[:, rows.tokens], kv_heads).to(dtype) for x in (grad, q, out))
            weights = (_scores(q, keys, rows, spec) - lse[..., rows.tokens].unsqueeze(-1)).exp_()
            dvalues[:, rows.blocks] += torch.einsum("bhgti,bthgd->bihd", weights, upstream)
            dscores = torch.einsum("bthgd,bihd->bhgti", upstream, values[:, rows.blocks].to(dtype))
            row_dots = (upstream * output).sum(-1).movedim(1, -1)  # [B, Hkv, G, t]
            dscores.sub_(row_dots.unsqueeze(-1)).mul_(weights).mul_(spec.scale)
            of_queries = torch.einsum("bhgti,bihd->bthgd", dscores, keys[:, rows.blocks].to(dtype))
            dq[:, rows.tokens] = of_queries.flatten(2, 3).to(q.dtype)
            dkeys[:, rows.blocks] += torch.einsum("bhgti,bthgd->bihd", dscores, queries)
        return dq, dkeys.to(keys.dtype), dvalues.to(values.dtype), None, None


def _scores(q: torch.Tensor, keys: torch.Tensor, rows: _Rows, spec: AttentionSpec) -> torch.Tensor:
    """Scores [B, Hkv, G, t, i], -inf where a block ends after the query."""
    dtype = accumulation_dtype(q.dtype)
    queries = _grouped(q[:, rows.tokens], keys.shape[2]).to(dtype) * spec.scale
    scores = torch.einsum("bthgd,bihd->bhgti", queries, keys[:, rows.blocks].to(dtype))
    return scores.masked_fill_(rows.unseen, -torch.inf)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """View of x [B, t, Hq, D] by KV head, [B, t, Hkv, G, D]."""
    return x.unflatten(2, (kv_heads, -1))

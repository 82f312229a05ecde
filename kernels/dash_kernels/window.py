"""Window attention on one device: exact softmax attention of each query to the last keys up to its own.

Knows packed segments of queries and keys; does not know that ranks exist. On GPUs, 16-bit tensors take
PyTorch's flash kernels. All others take blocks of queries, each with the band of keys that it reaches, so that no
buffer grows with the tokens times the window.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dash_kernels.attention import without_autocast
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import accumulation_dtype, require

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch 2.10 on platforms without it
    _FLASH_PARAMETERS: frozenset[str] = frozenset()
else:
    _FLASH_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)
# PyTorch 2.10 has no window; from 2.12 on groups of query heads must be asked for.
_FLASH_HAS_WINDOWS = "window_size" in _FLASH_PARAMETERS
_FLASH_GROUPS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _FLASH_PARAMETERS else {}
_MAX_FLASH_HEAD_DIM = 256

_BLOCK = 128
"""Queries of a block."""


class Segments:
    """Stretches of queries and the keys that each may attend to, in the order of two packed tensors.

    The last query of a segment meets its last key. A segment has at least as many keys as queries: the first ones are
    of earlier tokens.

    Args:
        queries, keys: tokens of each segment.

    Raises:
        ValueError: a segment has more queries than keys, or none.
    """

    def __init__(self, queries: list[int], keys: list[int]) -> None:
        for number, (of_queries, of_keys) in enumerate(zip(queries, keys, strict=True)):
            require(
                0 < of_queries <= of_keys,
                f"segment {number} has {of_queries} queries and {of_keys} keys: give each query its key",
            )
        self.query_edges = [0, *itertools.accumulate(queries)]
        self.key_edges = [0, *itertools.accumulate(keys)]
        self.most_queries, self.most_keys = max(queries), max(keys)
        self._lengths = queries, keys
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._repeated: dict[int, Segments] = {}

    def repeated(self, batch: int) -> Segments:
        """Segments of a batch whose sequences have these, made once."""
        if batch == 1:
            return self
        if batch not in self._repeated:
            queries, keys = self._lengths
            self._repeated[batch] = Segments(queries * batch, keys * batch)
        return self._repeated[batch]

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges of queries and of keys, int32 [segments + 1] on a device, uploaded once."""
        if device not in self._on_device:
            edges = (torch.tensor(edges, dtype=torch.int32) for edges in (self.query_edges, self.key_edges))
            queries, keys = (one.to(device) for one in edges)
            self._on_device[device] = queries, keys
        return self._on_device[device]

    def blocks(self, window: int) -> Iterator[tuple[slice, slice, int]]:
        """Yield blocks of queries, the keys that they reach, and the first query's place among those keys."""
        pairs = zip(itertools.pairwise(self.query_edges), itertools.pairwise(self.key_edges), strict=True)
        for (begin, end), (first_key, last_key) in pairs:
            for first in range(begin, end, _BLOCK):
                last = min(first + _BLOCK, end)
                own, stop = last_key - (end - first), last_key - (end - last)
                start = max(own - window + 1, first_key)
                yield slice(first, last), slice(start, stop), own - start


@functools.lru_cache(maxsize=64)
def document_segments(sequence: ChunkGrid) -> Segments:
    """Documents of a whole sequence, each with its own keys."""
    lengths = torch.zeros(len(sequence), dtype=torch.int64).index_add_(
        0, sequence.firsts.long(), sequence.lengths.long()
    )
    of_documents = lengths[lengths > 0].tolist()
    return Segments(of_documents, of_documents)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments | None = None,
    *,
    window: int,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Attention of each query to the last `window` keys of its segment up to its own, itself counted.

    This is the convention of `sliding_window` in transformers. A window of all keys is causal attention.

    Args:
        q: [B, T, Hq, D].
        k, v: [B, S, Hkv, D], S >= T.
        segments: of every sequence of the batch; None for one segment, whose last query meets the last key.
        softmax_scale: None for 1 / sqrt(D).

    Returns:
        [B, T, Hq, D] in q's dtype.

    Raises:
        ValueError: shapes, segments or the window do not fit.
    """
    batch, tokens, _, head_dim = q.shape
    require(window > 0, f"window is {window}: give a number of tokens above 0")
    require(
        k.shape == v.shape and k.shape[0] == batch and k.shape[3] == head_dim and q.shape[2] % k.shape[2] == 0,
        f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: give [B, T, Hq, D], and twice "
        "[B, S, Hkv, D] with Hq a multiple of Hkv",
    )
    segments = segments or Segments([tokens], [k.shape[1]])
    require(
        (segments.query_edges[-1], segments.key_edges[-1]) == (tokens, k.shape[1]),
        f"segments have {segments.query_edges[-1]} queries and {segments.key_edges[-1]} keys, but q has {tokens} and k "
        f"{k.shape[1]}",
    )
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    segments = segments.repeated(batch)
    attend = _flash if _takes_flash(q) else _Blocks.apply
    out: torch.Tensor = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), segments, window, scale)
    return out.unflatten(0, (batch, tokens))


def _takes_flash(q: torch.Tensor) -> bool:
    fits = q.shape[3] <= _MAX_FLASH_HEAD_DIM and q.shape[3] % 8 == 0
    return _FLASH_HAS_WINDOWS and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and fits


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, window: int, scale: float
) -> torch.Tensor:
    queries, keys = segments.on(q.device)
    before = min(window - 1, segments.most_keys)
    out = varlen_attn(
        q,
        k,
        v,
        queries,
        keys,
        segments.most_queries,
        segments.most_keys,
        scale=scale,
        window_size=(before, 0),
        **_FLASH_GROUPS,
    )
    assert isinstance(out, torch.Tensor)  # no log-sum-exp was asked for
    return out


class _Blocks(torch.autograd.Function):
    """Window attention of packed q [T, Hq, D], k and v [S, Hkv, D], block by block of queries, without atomics."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, window: int, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(k.shape[1], q.shape[1] // k.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype))
        for rows, band, own in segments.blocks(window):
            scores = _scores(q[rows], k[band], own, window, scale)
            lse[..., rows] = scores.logsumexp(-1)
            weights = (scores - lse[..., rows].unsqueeze(-1)).exp_()
            out[rows] = torch.einsum("hgts,shd->thgd", weights, v[band].to(weights.dtype)).flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = segments, window, scale
        return out

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        segments, window, scale = ctx.call
        dtype = lse.dtype
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
        for rows, band, own in segments.blocks(window):
            keys, values = k[band].to(dtype), v[band].to(dtype)
            upstream, queries = (_grouped(x[rows], k.shape[1]).to(dtype) for x in (grad, q))  # [t, Hkv, G, D]
            weights = (_scores(q[rows], k[band], own, window, scale) - lse[..., rows].unsqueeze(-1)).exp_()
            row_dots = (upstream * _grouped(out[rows], k.shape[1])).sum(-1).movedim(0, -1)  # [Hkv, G, t]
            dv[band] += torch.einsum("hgts,thgd->shd", weights, upstream)
            dscores = torch.einsum("thgd,shd->hgts", upstream, values).sub_(row_dots.unsqueeze(-1))
            dscores.mul_(weights).mul_(scale)
            dq[rows] = torch.einsum("hgts,shd->thgd", dscores, keys).flatten(1, 2).to(q.dtype)
            dk[band] += torch.einsum("hgts,thgd->shd", dscores, queries)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _scores(q: torch.Tensor, k: torch.Tensor, own: int, window: int, scale: float) -> torch.Tensor:
    """Scores [Hkv, G, t, s] of a block, -inf outside the window; the first query is that of key `own`."""
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("thgd,shd->hgts", _grouped(q, k.shape[1]).to(dtype) * scale, k.to(dtype))
    distance = torch.arange(own, own + len(q), device=q.device)[:, None] - torch.arange(len(k), device=q.device)
    return scores.masked_fill_((distance < 0) | (distance >= window), -torch.inf)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """View of x [t, Hq, D] by KV head, [t, Hkv, G, D]."""
    return x.unflatten(1, (kv_heads, -1))

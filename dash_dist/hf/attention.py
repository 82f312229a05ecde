"""The attention function and the mask function that transformers calls for `dash_attention`.

Knows transformers' calling conventions, padding and cached tokens; does not know how the stages are computed. Rows of a
batch that hold different tokens are computed one by one, so that padding never reaches the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import causal_mask_function

from dash_dist.hf.cache import Bounds, DashCacheLayer
from dash_dist.hf.decode import decode
from dash_dist.hf.settings import spec_of
from dash_kernels import AttentionSpec, ChunkGrid, dash_attention
from dash_kernels.backend import select_backend
from dash_kernels.spec import Part, Queries

_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cache", "cu_seq_lens_q")
"""Arguments of other attention functions that change the result."""

_Rows = slice | list[int]
_Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, _Rows], torch.Tensor]


def padding_bounds(
    *,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """First token of each row, and one past its last: int64 [B, 2] on the CPU, None without padding.

    transformers calls it once per forward pass; `attention_mask` is bool [B, kv_length], True for tokens.

    Raises ValueError for padding between tokens, and for anything but a causal mask.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "dash_attention got another mask than the causal one, as for packed sequences, sliding windows or "
            "blocks: pass one sequence per row with an attention_mask, and no position_ids that restart"
        )
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if mask.shape[1] != kv_length:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {kv_length} tokens: one per token, cached or new"
        )
    positions = torch.arange(kv_length, device=mask.device)
    tokens = mask.sum(1)
    end = torch.where(mask, positions + 1, 0).amax(1)
    end = torch.where(tokens == 0, kv_length, end)
    bounds = torch.stack((end - tokens, end, torch.where(mask, positions, kv_length).amin(1)), dim=1).cpu()
    for row, (start, _end, first) in enumerate(bounds.tolist()):
        if start != first:
            raise ValueError(
                f"row {row} of attention_mask has padding between tokens: pad each row at one side, and at the left to "
                "generate from it"
            )
    if bounds[:, 0].any() or (bounds[:, 1] != kv_length).any():
        return bounds[:, :2].contiguous()
    return None


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    dash_cache: DashCacheLayer | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """DashAttention of one layer, in the form of transformers' `AttentionInterface`.

    Args:
        module: attention module with `summary_query` [Hkv, D] and `config.dash_attention`.
        query: [B, Hq, T, D], the last T tokens.
        key, value: [B, Hkv, S, D] of all tokens, S >= T.
        attention_mask: from `padding_bounds`, int64 [B, 2] or None.
        scaling: softmax_scale where the settings have none.
        dropout: 0; DashAttention has none.
        dash_cache: cache of this layer; needed for S > T.

    Returns [B, T, Hq, D] and no weights; padding tokens get zeros or rubbish.
    """
    summary_query = getattr(module, "summary_query", None)
    spec = spec_of(getattr(module, "config", None))
    if summary_query is None:
        raise ValueError(
            "the model was built before dash_dist.hf was imported, so it has no summary_query: call "
            "dash_dist.hf.load(folder), or import dash_dist.hf before from_pretrained"
        )
    given = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if given or dropout:
        raise ValueError(f"dash_attention takes no {', '.join(given) or f'attention dropout ({dropout})'}")
    if spec.softmax_scale is None and scaling is not None:
        spec = spec.replaced(softmax_scale=scaling)
    spec = spec.for_head_dim(query.shape[-1])
    bounds = _bounds(attention_mask)
    past = key.shape[2] - query.shape[2]
    if past > 0 and dash_cache is None:
        raise ValueError(
            f"{past} cached tokens reached dash_attention without their summaries: pass past_key_values by keyword, "
            "to a model whose attention modules pass on their keyword arguments"
        )
    if dash_cache is not None:
        dash_cache.summarize(key, bounds, summary_query, spec)
    if past == 0 or dash_cache is None:

        def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: _Rows) -> torch.Tensor:
            return dash_attention(q, k, v, summary_query, spec=spec)

        return _by_rows(query, key, value, bounds, whole), None
    with torch.no_grad():
        summaries = dash_cache.summaries
        if query.shape[2] == 1:
            starts = None if bounds is None else torch.tensor([start for start, _ in bounds], device=query.device)
            out = decode(query.squeeze(2), key, value, summaries, starts, spec).unsqueeze(1)
        else:

            def later(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: _Rows) -> torch.Tensor:
                if q.shape[1] == k.shape[1]:
                    return dash_attention(q, k, v, summary_query, spec=spec)
                return _continue(q, k, v, None if summaries is None else summaries[rows], spec)

            out = _by_rows(query, key, value, bounds, later)
    return _Undifferentiable.apply(out, query) if query.requires_grad else out, None


def _bounds(attention_mask: torch.Tensor | None) -> Bounds | None:
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != 2 or attention_mask.dtype != torch.int64:
        raise ValueError(
            f"dash_attention got a mask of shape {tuple(attention_mask.shape)}: pass attention_mask as [batch, tokens]"
        )
    return [(start, end) for start, end in attention_mask.tolist()]


def _by_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds | None, compute: _Compute
) -> torch.Tensor:
    """Apply `compute` to the rows with the same tokens, without their padding; returns [B, T, Hq, D].

    `compute` takes q [b, t, Hq, D], k and v [b, s, Hkv, D] and the rows' indices in the batch.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # they differ under autocast
    length = key.shape[2]
    past = length - query.shape[2]
    if bounds is None:
        return compute(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), slice(None))
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for start, end in sorted(set(bounds)):
        rows = [row for row, found in enumerate(bounds) if found == (start, end)]
        first = max(start, past)
        if first < end:
            q = query[rows, :, first - past : end - past].transpose(1, 2)
            k, v = (x[rows, :, start:end].transpose(1, 2) for x in (key, value))
            out[rows, first - past : end - past] = compute(q, k, v, rows)
    return out


def _continue(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, summaries: torch.Tensor | None, spec: AttentionSpec
) -> torch.Tensor:
    """DashAttention of the last t tokens of sequences whose earlier tokens are cached.

    q [b, t, Hq, D], k and v [b, s, Hkv, D], summaries [b, n, Hkv, D] of the whole chunks. Returns [b, t, Hq, D].
    """
    length, tokens = k.shape[1], q.shape[1]
    first = (length - tokens) // spec.chunk_size  # chunk of the first query
    missing = length - tokens - first * spec.chunk_size
    # The stages take queries in whole chunks: copies of the first one stand for the chunk's earlier queries.
    q = torch.cat((q[:, :1].expand(-1, missing, -1, -1), q), dim=1)
    grid = ChunkGrid.whole_sequence(length, spec.chunk_size)
    query_grid = grid.take(range(first, len(grid)))
    backend = select_backend("auto", q, k.shape[2], spec)
    if summaries is None:  # no chunk is whole, so nothing is routed
        summaries = backend.summarize(k, grid, k.new_zeros(k.shape[2:]), spec)
    unrouted = summaries.new_zeros(len(q), max(len(grid) - summaries.shape[1], 0), *summaries.shape[2:])
    summaries = torch.cat((summaries[:, : len(grid)], unrouted), dim=1)
    routing = backend.route(q, query_grid, summaries, spec)
    queries = Queries(q, query_grid, summaries, routing)
    out, _ = backend.attend(queries, Part(k, v, grid), spec, before=None, last=True)
    return out[:, missing:]


class _Undifferentiable(torch.autograd.Function):
    """Identity whose backward pass refuses."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, _query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_grads: torch.Tensor) -> tuple[None, None]:
        raise RuntimeError("DashAttention has no gradient through cached tokens: train with use_cache=False")

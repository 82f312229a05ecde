"""The attention function and the mask function that transformers calls for `dash_attention`, of every kind of layer.

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
from dash_dist.hf.settings import kind_of, spec_of
from dash_kernels import AttentionSpec, ChunkGrid, dash_attention
from dash_kernels.backend import select_backend
from dash_kernels.spec import Part, Queries
from dash_kernels.window import window_attention

_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "cu_seq_lens_q")
"""Arguments of other attention functions that change the result."""

_Rows = slice | list[int]
_Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, _Rows], torch.Tensor]


def padding_bounds(
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    batch_size: int = 1,
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """First token of each row, and one past its last: int64 [B, 2] on the CPU, None without padding.

    transformers calls it once per forward pass, and once more for layers with windows. Their cache may hold the tokens
    from `kv_offset` on, kv_length of them, new ones included. `attention_mask` is bool [B, kv_offset + kv_length],
    True for tokens. `local_size` is the window of such layers.

    Raises ValueError for padding between tokens, and for anything but a causal mask or one with windows.
    """
    if mask_function is not causal_mask_function and not (
        local_size and _is_window(mask_function, local_size, batch_size, range(kv_offset, kv_offset + kv_length))
    ):
        raise ValueError(
            "dash_attention got another mask than a causal one or that of a window, as for packed sequences or blocks: "
            "pass one sequence per row with an attention_mask, and no position_ids that restart"
        )
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if mask.shape[1] != kv_offset + kv_length:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {kv_offset + kv_length} tokens: one per token, cached or "
            "new"
        )
    mask = mask[:, kv_offset:]
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


def _is_window(mask_function: Callable[..., Any], window: int, batch: int, tokens: range) -> bool:
    """Return whether each token sees the one before it, as no packed one does, and the window ends where it should."""
    rows = torch.arange(batch)[:, None]
    queries = torch.arange(tokens.start + 1, tokens.stop)
    seen = mask_function(rows, 0, queries, queries - 1) if window > 1 else torch.ones(())
    last = torch.tensor(tokens.stop - 1)
    edges = [bool(mask_function(0, 0, last, last - distance)) for distance in (window - 1, window)]
    return bool(seen.all()) and edges == [True, False]


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
    """Attention of one layer by its kind, in the form of transformers' `AttentionInterface`.

    Args:
        module: attention module with `config.dash_attention`, and `summary_query` [Hkv, D] in a layer of kind dash.
        query: [B, Hq, T, D], the last T tokens.
        key, value: [B, Hkv, S, D] of all tokens, S >= T.
        attention_mask: from `padding_bounds`, int64 [B, 2] or None.
        scaling: softmax_scale where the settings have none.
        dropout: 0; DashAttention has none.
        dash_cache: cache of this layer; needed for S > T in a layer of kind dash.

    Returns [B, T, Hq, D] and no weights; padding tokens get zeros or rubbish.
    """
    given = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if given or dropout:
        raise ValueError(f"dash_attention takes no {', '.join(given) or f'attention dropout ({dropout})'}")
    summary_query = getattr(module, "summary_query", None)
    spec = spec_of(getattr(module, "config", None))
    kind, window = kind_of(module)
    if kwargs.get("sliding_window") not in (None, window):
        raise ValueError(
            f"dash_attention got sliding_window {kwargs['sliding_window']} for a layer of kind {kind}"
            + (f" with a window of {window}" if window else "")
        )
    if kind != "dash":
        return _without_routing(query, key, value, _bounds(attention_mask), window, spec.softmax_scale or scaling), None
    if summary_query is None:
        raise ValueError(
            "the model was built before dash_dist.hf was imported, so it has no summary_query: call "
            "dash_dist.hf.load(folder), or import dash_dist.hf before from_pretrained"
        )
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


def _without_routing(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Bounds | None,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention to the last `window` tokens, to all earlier ones if None; shapes as for `attention_forward`."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: _Rows) -> torch.Tensor:
        return window_attention(q, k, v, window=window or k.shape[1], softmax_scale=scale)

    return _by_rows(query, key, value, bounds, attend)


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

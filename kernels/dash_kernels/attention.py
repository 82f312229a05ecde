"""DashAttention of tensors on one device: the stages composed into one differentiable call. Knows nothing of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from dash_kernels.arguments import check_arguments, check_cu_seqlens
from dash_kernels.backend import Backend, select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import (
    AttentionSpec,
    OutputGradient,
    Part,
    Queries,
    Routing,
    RoutingStatistics,
    routing_statistics,
)


@overload
def dash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    chunk_size: int = ...,
    alpha: float = ...,
    routing_scale: float = ...,
    prior_sigma: float | None = ...,
    softmax_scale: float | None = ...,
    cu_seqlens: torch.Tensor | None = ...,
    backend: str = ...,
    return_routing: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def dash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    chunk_size: int = ...,
    alpha: float = ...,
    routing_scale: float = ...,
    prior_sigma: float | None = ...,
    softmax_scale: float | None = ...,
    cu_seqlens: torch.Tensor | None = ...,
    backend: str = ...,
    return_routing: Literal[True],
) -> tuple[torch.Tensor, RoutingStatistics]: ...


def dash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    chunk_size: int = 64,
    alpha: float = 1.5,
    routing_scale: float = 1.0,
    prior_sigma: float | None = None,
    softmax_scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
    return_routing: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, RoutingStatistics]:
    """Causal DashAttention (arXiv 2605.18753), differentiable in q, k, v and summary_query.

    Every query attends to its own chunk and to the earlier chunks that alpha-entmax over the chunks' summaries gives a
    probability; the mean probability over the query heads of a KV head biases the softmax over the selected tokens.

    Args:
        q: [B, T, Hq, D], after rotary embedding; float16, bfloat16, float32 or float64.
        k, v: [B, T, Hkv, D], Hq a multiple of Hkv. T need not be a multiple of chunk_size.
        summary_query: [Hkv, D], any float dtype; zeros make a summary the mean of its keys.
        chunk_size: tokens that are routed as one, a multiple of 16 from 16 to 128.
        alpha: in (1, 2]; 1.5 is the fast path, 2 is sparsemax.
        routing_scale: factor of the routing logits; larger is sparser.
        prior_sigma: None for the bias log P; a positive number for (log P - mean log P) / prior_sigma.
        softmax_scale: takes the place of 1 / sqrt(D) in all three stages.
        cu_seqlens: None for sequences of one document. For documents packed into one sequence, B = 1: int32
            [documents + 1] on the CPU or on q's device, where document i is the tokens cu_seqlens[i] to
            cu_seqlens[i + 1] - 1 (FlashAttention's varlen interface). Documents of any length, 0 included; each is
            computed as a sequence of its own. Reading a tensor on a GPU waits for the GPU, so what was read is kept
            for as long as the tensor lives unchanged: give all layers of a model the same tensor object, and give a new
            one for new documents rather than writing to its memory behind torch's back.
        backend: "triton", "eager", or "auto" (Triton on a GPU, eager elsewhere).
        return_routing: also return the `RoutingStatistics` of the call.

    Returns:
        [B, T, Hq, D] in q's dtype; with return_routing the pair (output, RoutingStatistics).

    Raises:
        ValueError: a shape, dtype, device, or setting that is not allowed; the message names it.
    """
    spec = check_arguments(
        q,
        k,
        v,
        summary_query,
        chunk_size=chunk_size,
        alpha=alpha,
        routing_scale=routing_scale,
        prior_sigma=prior_sigma,
        softmax_scale=softmax_scale,
    )
    if cu_seqlens is None:
        chunks = ChunkGrid.whole_sequence(q.shape[1], chunk_size)
    else:
        chunks = packed_chunks(cu_seqlens, q, q.shape[1], chunk_size)
    out, selected = _DashAttention.apply(
        q, k, v, summary_query, chunks, spec, select_backend(backend, q, k.shape[2], spec)
    )
    if not return_routing:
        return out
    return out, routing_statistics(selected, chunks)


# By cu_seqlens tensor, for as long as it lives: its version, and the grid by length of the sequence and chunk size.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_chunks(cu_seqlens: torch.Tensor, q: torch.Tensor, seq_len: int, chunk_size: int) -> ChunkGrid:
    """The grid of packed documents, the same object for the same tensor; q [1, T, Hq, D] holds all tokens of the
    sequence or a shard of them. Raises ValueError for a cu_seqlens that does not fit.
    """
    # An inference tensor has no version, and what is no tensor is refused by the check.
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.is_inference():
        return ChunkGrid.packed(check_cu_seqlens(cu_seqlens, q, seq_len), chunk_size)
    version, grids = _packed.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        grids = {}
        _packed[cu_seqlens] = cu_seqlens._version, grids
    key = q.shape[0], seq_len, q.device, chunk_size
    if key not in grids:
        grids[key] = ChunkGrid.packed(check_cu_seqlens(cu_seqlens, q, seq_len), chunk_size)
    return grids[key]


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The forward or backward of an autograd function, run in the dtypes it chooses itself."""

    @functools.wraps(function)
    def call(ctx: Any, first: torch.Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *rest)

    return call


class _DashAttention(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        summary_query: torch.Tensor,
        chunks: ChunkGrid,
        spec: AttentionSpec,
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summaries = backend.summarize(k, chunks, summary_query, spec)
        routing = backend.route(q, chunks, summaries, spec)
        queries = Queries(q, chunks, summaries, routing)
        out, lse = backend.attend(queries, Part(k, v, chunks), spec, before=None, last=True)
        ctx.save_for_backward(
            q, k, v, summary_query, out, lse, summaries, routing.tau, routing.log_mean, routing.selected, routing.masks
        )
        ctx.call = chunks, spec, backend
        ctx.mark_non_differentiable(routing.selected)
        return out, routing.selected

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, summary_query, out, lse, summaries, *of_routing = ctx.saved_tensors
        chunks, spec, backend = ctx.call
        part, queries = Part(k, v, chunks), Queries(q, chunks, summaries, Routing(*of_routing))
        upstream = OutputGradient(grad, lse, backend.row_dots(grad, out))
        dq, ratio = backend.finish_query_gradient(queries, upstream, part, spec, None)
        (dk, dv), dsummary_query = backend.key_gradient(queries, upstream, ratio, part, summary_query, spec)
        grads = dq, dk.to(k.dtype), dv.to(v.dtype), dsummary_query.to(summary_query.dtype)
        return *grads, None, None, None

"""DashAttention of tensors on one device: the stages composed into one differentiable call.

Knows the order of the stages and what the backward pass needs; does not know ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, Unpack

import torch
from torch.autograd.function import once_differentiable

from dash_kernels.arguments import check_summaries, check_tensors, sequence_chunks
from dash_kernels.backend import Backend, select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import (
    AttentionSettings,
    AttentionSpec,
    OutputGradient,
    Part,
    Queries,
    Routing,
    routing_statistics,
)


class RoutingMemory(Protocol):
    """Routing of calls that are made twice: without gradients, and again with them in a backward pass."""

    def remember(self, kept: Routing) -> None:
        """Keep the routing of a call without gradients."""
        ...

    def recall(self) -> Routing | None:
        """Take the routing of the call that is being repeated; None if there is none."""
        ...


def dash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    spec: AttentionSpec | None = None,
    cu_seqlens: torch.Tensor | None = None,
    chunks: ChunkGrid | None = None,
    backend: str = "auto",
    return_routing: bool = False,
    memory: RoutingMemory | None = None,
    summaries: torch.Tensor | None = None,
    **settings: Unpack[AttentionSettings],
) -> Any:
    """Causal DashAttention (arXiv 2605.18753), differentiable in q, k, v and summary_query.

    Every query attends to its own chunk and to the earlier chunks with a positive routing probability. That is the
    alpha-entmax of the query's scores against one summary per chunk. The mean probability over the query heads of a KV
    head biases the softmax over the selected tokens. docs/algorithm.md is the definition.

    Args:
        q: [B, T, Hq, D], after rotary embedding; float16, bfloat16, float32 or float64.
        k, v: [B, T, Hkv, D], Hq a multiple of Hkv. T need not be a multiple of chunk_size.
        summary_query: [Hkv, D], any float dtype; zeros make a summary the mean of its keys.
        spec: constants of the function; None for the defaults.
        cu_seqlens: None for sequences of one document. For documents packed into one sequence, B = 1: int32
            [documents + 1] on the CPU or on q's device. Document i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1
            (FlashAttention's varlen interface), any number of them, and is computed as a sequence of its own. Every
            call reads the values, and waits for the GPU if they are there.
        chunks: the grid of the documents in place of cu_seqlens, `ChunkGrid.packed(cu_seqlens.tolist(), chunk_size)`.
            Build it once per batch and pass it to all layers.
        backend: "triton", "eager", or "auto" (Triton on a GPU, eager elsewhere).
        return_routing: also return the `RoutingStatistics` of the call.
        memory: of a layer whose activations are recomputed. A call without gradients leaves its routing there, and the
            call that repeats it with gradients takes it.
        summaries: of the whole sequence, by which `selection.NSA` selects chunks; see `selection_scores.by_chunk`.
        settings: fields of `spec` by keyword, all but `selection`.

    Returns:
        [B, T, Hq, D] in q's dtype; with return_routing the pair (output, RoutingStatistics).

    Raises:
        ValueError: a shape, dtype, device, or setting is not allowed; the message names it.
    """
    check_tensors(q, k, v, summary_query)
    spec = (spec or AttentionSpec()).replaced(**settings).for_head_dim(q.shape[-1])
    grid = sequence_chunks(chunks, cu_seqlens, q, q.shape[1], spec)
    check_summaries(summaries, k, len(grid), spec)
    stages = select_backend(backend, q, k.shape[2], spec)
    recalled = memory.recall() if memory is not None and torch.is_grad_enabled() else None
    routings: list[Routing] = []  # autograd functions return only tensors
    out, selected = _DashAttention.apply(q, k, v, summary_query, grid, spec, stages, summaries, recalled, routings)
    if memory is not None and not torch.is_grad_enabled():
        memory.remember(routings[0])
    return (out, routing_statistics(selected, grid)) if return_routing else out


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the forward or backward of an autograd function without autocast."""

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
        summaries: torch.Tensor | None,
        recalled: Routing | None,
        routings: list[Routing],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if summaries is None:
            summaries = backend.summarize(k, chunks, summary_query, spec)
        routing = recalled or backend.route(q, chunks, summaries, spec)
        routings.append(routing)
        queries = Queries(q, chunks, summaries, routing)
        out, lse = backend.attend(queries, Part(k, v, chunks), spec, before=None, last=True)
        ctx.save_for_backward(q, k, v, summary_query, out, lse, summaries, *routing.tensors)
        ctx.call = chunks, spec, backend
        ctx.mark_non_differentiable(routing.selected)
        return out, routing.selected

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, summary_query, out, lse, summaries, *routing = ctx.saved_tensors
        chunks, spec, backend = ctx.call
        part, queries = Part(k, v, chunks), Queries(q, chunks, summaries, Routing(*routing))
        upstream = OutputGradient(grad, lse, backend.row_dots(grad, out))
        dq, ratio = backend.finish_query_gradient(queries, upstream, part, spec, None)
        (dk, dv), dsummary_query = backend.key_gradient(queries, upstream, ratio, part, summary_query, spec)
        grads = dq, dk.to(k.dtype), dv.to(v.dtype), dsummary_query.to(summary_query.dtype)
        return *grads, None, None, None, None, None, None

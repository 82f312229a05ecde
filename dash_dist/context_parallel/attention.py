"""DashAttention over a context-parallel group: one differentiable call on the ranks' shards.

Summaries are all-gathered and routing is computed against all of them, then the exchange takes over. Knows what the
ranks must agree on; the exchanges know when which tensor moves.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dash_dist.context_parallel.agreement import check_together
from dash_dist.context_parallel.exchanges import EXCHANGES, Call, Exchange, check_exchange
from dash_dist.context_parallel.layout import check_layout, pieces_of
from dash_dist.context_parallel.shard import Shard
from dash_kernels import RoutingStatistics
from dash_kernels import dash_attention as dash_attention_one_device
from dash_kernels.arguments import check_arguments
from dash_kernels.attention import without_autocast
from dash_kernels.backend import Backend, select_backend
from dash_kernels.spec import AttentionSpec, Routing, routing_statistics


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
    backend: str = ...,
    return_routing: Literal[False] = ...,
    cp_group: dist.ProcessGroup | None = ...,
    layout: str = ...,
    exchange: str = ...,
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
    backend: str = ...,
    return_routing: Literal[True],
    cp_group: dist.ProcessGroup | None = ...,
    layout: str = ...,
    exchange: str = ...,
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
    backend: str = "auto",
    return_routing: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    exchange: str = "ring",
) -> torch.Tensor | tuple[torch.Tensor, RoutingStatistics]:
    """`dash_kernels.dash_attention` of a sequence that is split over the ranks of cp_group.

    q, k, v are this rank's shard [B, T / size, heads, D] as `split_sequence` gives it, the same shape at every rank;
    summary_query is the same at every rank. The result is this rank's shard of the output. The gradient of
    summary_query is this rank's part of it: sum it over the group, as for any replicated weight. The sequence is one
    document: packed documents (cu_seqlens) are computed on one device only.

    Args beyond those of `dash_kernels.dash_attention`:
        cp_group: the context-parallel group; None computes on this device alone.
        layout: "zigzag" or "contiguous"; must be the one the sequence was split with.
        exchange: "ring" (K and V pass from rank to rank) or "allgather" (every rank holds all of K and V meanwhile).

    With return_routing, the statistics are those of this rank's tokens.

    Raises:
        ValueError: at every rank of the group, when an argument is not allowed at any of them or when they differ. On
            GPUs, calls are compared the first time a rank meets their shapes and settings; a rank that later calls
            differently from the others fails alone, and they by the group's timeout.
    """
    settings: dict[str, Any] = {
        "chunk_size": chunk_size,
        "alpha": alpha,
        "routing_scale": routing_scale,
        "prior_sigma": prior_sigma,
        "softmax_scale": softmax_scale,
    }
    if cp_group is None:
        check_layout(layout)
        check_exchange(exchange)
        call = (q, k, v, summary_query)
        if return_routing:
            return dash_attention_one_device(*call, **settings, backend=backend, return_routing=True)
        return dash_attention_one_device(*call, **settings, backend=backend)

    def check() -> tuple[AttentionSpec, Backend, Shard]:
        spec = check_arguments(q, k, v, summary_query, **settings)
        check_exchange(exchange)
        chunks_per_rank = _chunks_per_rank(q.shape[1], chunk_size, dist.get_world_size(cp_group), layout)
        return spec, select_backend(backend, q, k.shape[2], spec), Shard(cp_group, layout, chunks_per_rank, chunk_size)

    shapes = tuple(tuple(x.shape) for x in (q, k, v, summary_query))
    call_of_rank = (shapes, str(q.dtype), layout, exchange, backend, *settings.items())
    spec, stages, shard = check_together(check, call_of_rank, cp_group, once=q.is_cuda)
    out, selected = _ContextParallelAttention.apply(q, k, v, summary_query, shard, spec, stages, EXCHANGES[exchange])
    if not return_routing:
        return out
    return out, routing_statistics(selected, shard.chunks)


def _chunks_per_rank(shard_len: int, chunk_size: int, size: int, layout: str) -> int:
    pieces, _ = pieces_of(0, size, layout)
    step = chunk_size * len(pieces)
    if shard_len % step:
        whole = shard_len * size
        unit = step * size
        factors = f"{'2 x ' if len(pieces) == 2 else ''}cp x chunk_size"
        raise ValueError(
            f"sequence length {whole} is not a multiple of {factors} = {unit}: pad to {-(-whole // unit) * unit}"
        )
    return shard_len // chunk_size


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        summary_query: torch.Tensor,
        shard: Shard,
        spec: AttentionSpec,
        stages: Backend,
        exchange: Exchange,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summaries = shard.gather_summaries(stages.summarize(k, shard.chunks, summary_query, spec))
        routing = stages.route(q, shard.chunks, summaries, spec)
        out, lse = exchange.attend(Call(q, k, v, summary_query, summaries, routing, shard, spec, stages))
        ctx.save_for_backward(
            q, k, v, summary_query, out, lse, summaries, routing.tau, routing.log_mean, routing.selected, routing.masks
        )
        ctx.call = shard, spec, stages, exchange
        ctx.mark_non_differentiable(routing.selected)
        return out, routing.selected

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, summary_query, out, lse, summaries, *of_routing = ctx.saved_tensors
        shard, spec, stages, exchange = ctx.call
        call = Call(q, k, v, summary_query, summaries, Routing(*of_routing), shard, spec, stages)
        dq, (dk, dv), dsummary_query = exchange.backward(call, grad, out, lse)
        grads = dq, dk.to(k.dtype), dv.to(v.dtype), dsummary_query.to(summary_query.dtype)
        return *grads, None, None, None, None

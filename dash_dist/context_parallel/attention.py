"""DashAttention over a context-parallel group: the stages of `dash_kernels` with the exchanges between them.

Knows when which tensor moves; the exchanges know how, the kernels what is computed. Forward: summaries are all-gathered
and routing is computed against all of them; K and V come part by part, partial results merge by log-sum-exp. Backward:
the exchange carries dK and dV home, and the summaries' gradients are reduced to their owners.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dash_dist.context_parallel import allgather, ring
from dash_dist.context_parallel.agreement import check_together
from dash_dist.context_parallel.layout import check_layout, pieces_of
from dash_dist.context_parallel.shard import Shard
from dash_kernels import RoutingStatistics
from dash_kernels import dash_attention as dash_attention_one_device
from dash_kernels.arguments import check_arguments
from dash_kernels.attention import without_autocast
from dash_kernels.backend import Backend, select_backend
from dash_kernels.spec import AttentionSpec, ChunkIds, GradientSums, Routing, routing_statistics

EXCHANGES = {"ring": ring, "allgather": allgather}


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
    summary_query is this shard's part of it: sum it over the group, as for any replicated weight.

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
        shard = Shard(cp_group, layout, _chunks_per_rank(q.shape[1], chunk_size, dist.get_world_size(cp_group), layout))
        return spec, select_backend(backend, q, spec), shard

    shapes = tuple(tuple(x.shape) for x in (q, k, v, summary_query))
    call_of_rank = (shapes, str(q.dtype), layout, exchange, backend, *settings.items())
    spec, stages, shard = check_together(check, call_of_rank, cp_group, once=q.is_cuda)
    out, selected = _ContextParallelAttention.apply(q, k, v, summary_query, shard, spec, stages, EXCHANGES[exchange])
    if not return_routing:
        return out
    return out, routing_statistics(selected, shard.chunks, chunk_size)


def check_exchange(exchange: str) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}: give one of {', '.join(EXCHANGES)}")


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
        exchange: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summaries = shard.gather_summaries(stages.summarize(k, summary_query, spec))
        routing = stages.route(q, shard.chunks, summaries, spec)
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for chunks, part_k, part_v in exchange.parts(k, v, shard):
            part = stages.attend(q, shard.chunks, part_k, part_v, chunks, summaries, routing, spec)
            merged = part if merged is None else _merge(*merged, *part)
        assert merged is not None  # every exchange yields at least the own part
        out, lse = merged[0].to(q.dtype), merged[1]
        ctx.save_for_backward(
            q, k, v, summary_query, summaries, routing.tau, routing.log_mean, routing.selected, out, lse
        )
        ctx.call = shard, spec, stages, exchange
        ctx.mark_non_differentiable(routing.selected)
        return out, routing.selected

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, summary_query, summaries, tau, log_mean, selected, out, lse = ctx.saved_tensors
        shard, spec, stages, exchange = ctx.call
        routing = Routing(tau, log_mean, selected)
        accumulate = summaries.dtype
        delta = (grad.to(accumulate) * out.to(accumulate)).sum(-1)
        sums = GradientSums.zeros(q, summaries)

        def compute(chunks: ChunkIds, part_k: torch.Tensor, part_v: torch.Tensor) -> torch.Tensor:
            return stages.attend_backward(
                grad, q, shard.chunks, part_k, part_v, chunks, summaries, routing, lse, delta, spec, sums
            )

        dk, dv = exchange.backward(k, v, shard, compute)
        stages.route_backward(q, shard.chunks, summaries, routing, spec, sums)
        own_dsummaries = shard.reduce_summary_gradient(sums.dsummaries)
        dsummary_query = stages.summarize_backward(own_dsummaries, k, summary_query, spec, dk)
        grads = sums.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsummary_query.to(summary_query.dtype)
        return *grads, None, None, None, None


def _merge(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a part to a result whose lse is finite; the first part is the own one, where a token finds itself."""
    total = torch.logaddexp(lse, part_lse)
    weight, part_weight = torch.exp(lse - total).unsqueeze(-1), torch.exp(part_lse - total).unsqueeze(-1)
    return out * weight + part_out * part_weight, total

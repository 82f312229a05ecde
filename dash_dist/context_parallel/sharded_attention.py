"""DashAttention over a context-parallel group: one differentiable call on the ranks' shards.

Summaries are all-gathered and every rank routes against all of them, so it knows which chunks it needs. The exchange
brings those while the stages compute on the chunks that are there. Knows the order of the stages and what ranks must
agree on; does not know how tensors move.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dash_dist.context_parallel.agreement import Named, check_together
from dash_dist.context_parallel.choice import planned_exchange, static_exchange
from dash_dist.context_parallel.exchange import check_exchange
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.layout import check_layout
from dash_dist.context_parallel.recompute import ForwardMemory, RoutedPass
from dash_dist.context_parallel.shard import Shard, fingerprint, whole_chunks
from dash_dist.context_parallel.topology import find_topology
from dash_dist.cost_model.topology import Topology
from dash_kernels import dash_attention as dash_attention_one_device
from dash_kernels.arguments import check_summaries, check_tensors
from dash_kernels.attention import without_autocast
from dash_kernels.backend import Backend, select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import (
    AttentionSettings,
    AttentionSpec,
    Blocks,
    OutputGradient,
    Part,
    Queries,
    Routing,
    routing_statistics,
)


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
    cp_group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    exchange: str = "auto",
    ranks_per_node: int | None = None,
    traffic: Traffic | None = None,
    memory: ForwardMemory[Any] | None = None,
    summaries: torch.Tensor | None = None,
    **settings: Unpack[AttentionSettings],
) -> Any:
    """`dash_kernels.dash_attention` of a sequence that is split over the ranks of cp_group.

    q, k, v are this rank's shard [B, T / size, heads, D] as `split_sequence` returns it, of the same shape at every
    rank; summary_query is the same at every rank. The result is this rank's shard of the output. The gradient of
    summary_query is this rank's share: sum it over the group, as for any replicated weight.

    Args beyond those of `dash_kernels.dash_attention`:
        cu_seqlens, chunks: as there, for the whole sequence before it was split, and the same at every rank. With a
            cp_group every document must be whole chunks. Documents may cross the borders of shards.
        cp_group: the context-parallel group; None computes on this device alone.
        layout: "zigzag", "double_zigzag" or "contiguous"; must be the one the sequence was split with.
        exchange: "selective" (only selected chunks travel), "allgather" (every rank holds all of K and V meanwhile),
            "ring" (K and V pass from rank to rank; the least memory), or "auto": the one with the lowest predicted
            cost, see docs/context-parallelism.md. All give the same result.
        ranks_per_node: consecutive ranks of cp_group that share a fast link; None finds them by host name. The
            selective exchange sends a chunk once to every node that needs it, and forwards it inside the node.
        traffic: counts the bytes and waits of this call and of its backward pass.
        memory: as there. With a cp_group it holds the plan as well, and the recomputation keeps the received K and V
            for the backward pass.
        summaries: as there, of the whole sequence at every rank.

    With return_routing, the statistics are those of this rank's tokens.

    Raises:
        ValueError: at every rank of the group, when an argument is not allowed at any of them or when they differ. On
            GPUs, calls are compared the first time a rank sees their shapes and settings. A rank that later calls
            differently from the others fails alone, and they by the group's timeout.
        ExchangeError: a rank of the group died, or did not answer within the group's timeout.
    """
    if cp_group is None:
        check_layout(layout)
        check_exchange(exchange)
        return dash_attention_one_device(
            q,
            k,
            v,
            summary_query,
            spec=spec,
            cu_seqlens=cu_seqlens,
            chunks=chunks,
            backend=backend,
            return_routing=return_routing,
            memory=memory,
            summaries=summaries,
            **settings,
        )

    size = dist.get_world_size(cp_group)

    def check() -> tuple[tuple[AttentionSpec, Backend, Shard], tuple[Named, ...]]:
        check_tensors(q, k, v, summary_query)
        checked = (spec or AttentionSpec()).replaced(**settings).for_head_dim(q.shape[-1])
        check_exchange(exchange)
        check_layout(layout)
        if ranks_per_node is not None:
            Topology(size, ranks_per_node)
        sequence = whole_chunks(q, chunks, cu_seqlens, checked, size, layout)
        shard = Shard(cp_group, layout, sequence, checked.chunk_size)
        check_summaries(summaries, k, len(sequence), checked)
        packed = cu_seqlens is not None or chunks is not None
        documents = f"of documents {fingerprint(sequence)}" if packed else "not given"
        constants = ((field.name, getattr(checked, field.name)) for field in dataclasses.fields(checked))
        details = (*constants, ("cu_seqlens", documents))
        return (checked, select_backend(backend, q, k.shape[2], checked), shard), details

    tensors = {"q": q, "k": k, "v": v, "summary_query": summary_query}
    shapes = ((f"shape of {name}", tuple(x.shape)) for name, x in tensors.items())
    how = {"layout": layout, "exchange": exchange, "ranks_per_node": ranks_per_node, "backend": backend}
    call_of_rank = (*shapes, ("dtype", str(q.dtype)), *how.items())
    checked, stages, shard = check_together(check, call_of_rank, cp_group, once=q.is_cuda)
    recomputed = memory.recall() if memory is not None and torch.is_grad_enabled() else None
    topology = find_topology(cp_group, ranks_per_node)
    call = _Call(shard, checked, stages, exchange, topology, traffic or Traffic(), summaries, recomputed)
    passes: list[RoutedPass] = []  # autograd functions return only tensors
    out, selected = _ContextParallelAttention.apply(q, k, v, summary_query, call, passes)
    if memory is not None and not torch.is_grad_enabled():
        memory.remember(passes[0])
    return (out, routing_statistics(selected, shard.chunks)) if return_routing else out


@dataclass(frozen=True)
class _Call:
    """Arguments of a call besides its tensors that have gradients.

    summaries: of the whole sequence, where they were given. recomputed: the first pass, in a recomputation.
    """

    shard: Shard
    spec: AttentionSpec
    stages: Backend
    exchange: str
    topology: Topology
    traffic: Traffic
    summaries: torch.Tensor | None
    recomputed: RoutedPass | None


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        summary_query: torch.Tensor,
        call: _Call,
        passes: list[RoutedPass],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard, spec, stages, traffic = call.shard, call.spec, call.stages, call.traffic
        exchange = call.recomputed.exchange if call.recomputed else static_exchange(call.exchange, shard, call.topology)
        # Collectives of a group run one after another: the summaries first, since routing waits for them.
        summaries = call.summaries
        if summaries is None:
            summaries = shard.gather_summaries(stages.summarize(k, shard.chunks, summary_query, spec))
        # Without a plan, K and V leave before routing.
        delivery = None if exchange is None else exchange.deliver(k, v, traffic)
        routing = call.recomputed.routing if call.recomputed else stages.route(q, shard.chunks, summaries, spec)
        queries = Queries(q, shard.chunks, summaries, routing)
        if exchange is None:
            reached = stages.reached(routing, shard.chunks, summaries.shape[1], spec)
            group = q.shape[2] // k.shape[2]
            exchange = planned_exchange(call.exchange, reached, k, group, shard, call.topology)
        if delivery is None:
            delivery = exchange.deliver(k, v, traffic)
        state = None
        for part, last in delivery.parts():
            state = stages.attend(queries, part, spec, before=state, last=last)
        assert state is not None  # there is at least the own part
        out, lse = state
        traffic.call(exchange.name, routing.selected, len(shard.chunks), exchange.plan)
        passes.append(RoutedPass(routing, exchange))
        # The backward pass follows a recomputation at once, so the received K and V are kept for it.
        ctx.delivery = delivery if call.recomputed else None
        ctx.save_for_backward(q, k, v, summary_query, out, lse, summaries, *routing.tensors)
        ctx.call = call
        ctx.exchange = exchange
        ctx.mark_non_differentiable(routing.selected)
        return out, routing.selected

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, summary_query, out, lse, summaries, *routing = ctx.saved_tensors
        shard, spec, stages, traffic = ctx.call.shard, ctx.call.spec, ctx.call.stages, ctx.call.traffic
        delivery = ctx.delivery or ctx.exchange.deliver(k, v, traffic)
        queries = Queries(q, shard.chunks, summaries, Routing(*routing))
        upstream = OutputGradient(grad, lse, stages.row_dots(grad, out))
        sums = None
        for part, last in delivery.parts():
            if last:
                dq, ratio = stages.finish_query_gradient(queries, upstream, part, spec, sums)
            else:
                sums = stages.query_gradient(queries, upstream, part, spec, sums)
        dsummary_query = torch.zeros(summary_query.shape, dtype=summaries.dtype, device=q.device)

        def contribution_to(part: Part | Blocks) -> torch.Tensor:
            dkv, contribution = stages.key_gradient(queries, upstream, ratio, part, summary_query, spec)
            dsummary_query.add_(contribution)
            return dkv

        dk, dv = delivery.gradients(contribution_to)
        grads = dq, dk.to(k.dtype), dv.to(v.dtype), dsummary_query.to(summary_query.dtype)
        return *grads, None, None

"""DashAttention over a context-parallel group: one differentiable call on the ranks' shards.

Summaries are all-gathered and routing is computed against all of them; then every rank knows which chunks it needs, and
the exchange brings them while the stages compute on what is there. Knows what the ranks must agree on and what is
computed when; the exchanges know how tensors move.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dash_dist.context_parallel.agreement import check_together
from dash_dist.context_parallel.exchanges import check_exchange, from_plan, of_everything
from dash_dist.context_parallel.layout import check_layout, pieces_of
from dash_dist.context_parallel.recompute import ForwardMemory, Found
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.topology import Topology
from dash_dist.context_parallel.traffic import Traffic
from dash_kernels import RoutingStatistics
from dash_kernels import dash_attention as dash_attention_one_device
from dash_kernels.arguments import check_arguments
from dash_kernels.attention import packed_chunks, without_autocast
from dash_kernels.backend import Backend, select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries, Routing, routing_statistics


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
    cu_seqlens: torch.Tensor | None = ...,
    cp_group: dist.ProcessGroup | None = ...,
    layout: str = ...,
    exchange: str = ...,
    ranks_per_node: int | None = ...,
    traffic: Traffic | None = ...,
    memory: ForwardMemory | None = ...,
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
    cu_seqlens: torch.Tensor | None = ...,
    cp_group: dist.ProcessGroup | None = ...,
    layout: str = ...,
    exchange: str = ...,
    ranks_per_node: int | None = ...,
    traffic: Traffic | None = ...,
    memory: ForwardMemory | None = ...,
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
    cu_seqlens: torch.Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    exchange: str = "auto",
    ranks_per_node: int | None = None,
    traffic: Traffic | None = None,
    memory: ForwardMemory | None = None,
) -> torch.Tensor | tuple[torch.Tensor, RoutingStatistics]:
    """`dash_kernels.dash_attention` of a sequence that is split over the ranks of cp_group.

    q, k, v are this rank's shard [B, T / size, heads, D] as `split_sequence` gives it, the same shape at every rank;
    summary_query is the same at every rank. The result is this rank's shard of the output. The gradient of
    summary_query is this rank's part of it: sum it over the group, as for any replicated weight.

    Args beyond those of `dash_kernels.dash_attention`:
        cu_seqlens: as there, of the whole sequence before it was split, and the same at every rank; with a cp_group
            every document must be whole chunks. Documents may cross the borders of shards.
        cp_group: the context-parallel group; None computes on this device alone.
        layout: "zigzag", "double_zigzag" or "contiguous"; must be the one the sequence was split with.
        exchange: "selective" (only chunks that routing selected travel), "allgather" (every rank holds all of K and V
            meanwhile), "ring" (K and V pass from rank to rank; the least memory), or "auto": the one that the plan of
            what was selected makes cheapest, see docs/context-parallelism.md. All give the same result.
        ranks_per_node: consecutive ranks of cp_group that share a fast link; None has them found by host name. The
            selective exchange sends a chunk once to every node that needs it, and on from there.
        traffic: adds up what this call, and its backward pass, send and wait for.
        memory: for a layer that is recomputed in the backward pass: the pass without gradients leaves its plan there,
            and the recomputation finds it, and keeps what it received for the backward pass.

    With return_routing, the statistics are those of this rank's tokens.

    Raises:
        ValueError: at every rank of the group, when an argument is not allowed at any of them or when they differ. On
            GPUs, calls are compared the first time a rank meets their shapes and settings; a rank that later calls
            differently from the others fails alone, and they by the group's timeout.
        ExchangeError: a rank of the group died, or did not answer within the group's timeout.
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
        whole = (q, k, v, summary_query)
        if return_routing:
            return dash_attention_one_device(
                *whole, **settings, cu_seqlens=cu_seqlens, backend=backend, return_routing=True
            )
        return dash_attention_one_device(*whole, **settings, cu_seqlens=cu_seqlens, backend=backend)

    size = dist.get_world_size(cp_group)

    def check() -> tuple[tuple[AttentionSpec, Backend, Shard], tuple[str, str]]:
        spec = check_arguments(q, k, v, summary_query, **settings)
        check_exchange(exchange)
        check_layout(layout)
        if ranks_per_node is not None:
            Topology(size, ranks_per_node)
        sequence = _whole_chunks(q, cu_seqlens, chunk_size, size, layout)
        shard = Shard(cp_group, layout, sequence, chunk_size)
        documents = "not given" if cu_seqlens is None else f"of documents {_fingerprint(sequence)}"
        return (spec, select_backend(backend, q, k.shape[2], spec), shard), ("cu_seqlens", documents)

    tensors = {"q": q, "k": k, "v": v, "summary_query": summary_query}
    shapes = ((f"shape of {name}", tuple(x.shape)) for name, x in tensors.items())
    how = {"layout": layout, "exchange": exchange, "ranks_per_node": ranks_per_node, "backend": backend}
    call_of_rank = (*shapes, ("dtype", str(q.dtype)), *how.items(), *settings.items())
    spec, stages, shard = check_together(check, call_of_rank, cp_group, once=q.is_cuda)
    recomputed = memory.recall() if memory is not None and torch.is_grad_enabled() else None
    call = _Call(shard, spec, stages, exchange, Topology.of(cp_group, ranks_per_node), traffic or Traffic(), recomputed)
    out, selected, found = _attend(q, k, v, summary_query, call)
    if memory is not None and not torch.is_grad_enabled():
        memory.remember(found)
    if not return_routing:
        return out
    return out, routing_statistics(selected, shard.chunks)


def _whole_chunks(
    q: torch.Tensor, cu_seqlens: torch.Tensor | None, chunk_size: int, size: int, layout: str
) -> ChunkGrid:
    """All chunks of the sequence that q is a shard of. Raises ValueError where a piece or document is not whole."""
    seq_len = q.shape[1] * size
    own, pieces = pieces_of(0, size, layout)
    if seq_len % (pieces * chunk_size):
        unit = pieces * chunk_size
        factors = f"{f'{len(own)} x ' if len(own) > 1 else ''}cp x chunk_size"
        raise ValueError(
            f"sequence length {seq_len} is not a multiple of {factors} = {unit}: pad to {-(-seq_len // unit) * unit}"
        )
    if cu_seqlens is None:
        return ChunkGrid.whole_sequence(seq_len, chunk_size)
    sequence = packed_chunks(cu_seqlens, q, seq_len, chunk_size)
    incomplete = (sequence.lengths < chunk_size).nonzero().flatten()
    if len(incomplete):
        slot = int(incomplete[0])
        end = int(sequence.starts[slot] + sequence.lengths[slot])
        raise ValueError(
            f"cu_seqlens has a document that ends at token {end} with a chunk of {int(sequence.lengths[slot])} tokens: "
            f"with a context-parallel group, pad every document to a multiple of chunk_size = {chunk_size}"
        )
    return sequence


@functools.lru_cache(maxsize=64)
def _fingerprint(sequence: ChunkGrid) -> str:
    """Equal for equal documents."""
    return hashlib.sha1(sequence.firsts.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Call:
    """What a call is besides its tensors. recomputed: what the first pass of a recomputed one has found."""

    shard: Shard
    spec: AttentionSpec
    stages: Backend
    exchange: str
    topology: Topology
    traffic: Traffic
    recomputed: Found | None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, summary_query: torch.Tensor, call: _Call
) -> tuple[torch.Tensor, torch.Tensor, Found]:
    """(output, selected chunks per token, what the pass has found)"""
    found: list[Found] = []  # autograd passes only tensors out
    out, selected = _ContextParallelAttention.apply(q, k, v, summary_query, call, found)
    return out, selected, found[0]


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
        found: list[Found],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard, spec, stages, traffic = call.shard, call.spec, call.stages, call.traffic
        exchange = call.recomputed.exchange if call.recomputed else of_everything(call.exchange, shard, call.topology)
        # A group's collectives follow each other on the links: the summaries first, which routing waits for.
        summaries = shard.gather_summaries(stages.summarize(k, shard.chunks, summary_query, spec))
        # Without a plan to wait for, K and V leave before routing.
        delivery = None if exchange is None else exchange.deliver(k, v, traffic)
        routing = call.recomputed.routing if call.recomputed else stages.route(q, shard.chunks, summaries, spec)
        queries = Queries(q, shard.chunks, summaries, routing)
        if exchange is None:
            reached = stages.reached(routing, shard.chunks, summaries.shape[1], spec)
            group = q.shape[2] // k.shape[2]
            exchange = from_plan(call.exchange, reached, k, group, shard, call.topology)
        if delivery is None:
            delivery = exchange.deliver(k, v, traffic)
        state = None
        for part, last in delivery.parts():
            state = stages.attend(queries, part, spec, before=state, last=last)
        assert state is not None  # there is at least the own part
        out, lse = state
        traffic.call(exchange.name, routing.selected, len(shard.chunks), exchange.plan)
        found.append(Found(routing, exchange))
        # After a recomputation the backward pass is next: what has come need not travel again.
        ctx.delivery = delivery if call.recomputed else None
        ctx.save_for_backward(
            q, k, v, summary_query, out, lse, summaries, routing.tau, routing.log_mean, routing.selected, routing.masks
        )
        ctx.call = call
        ctx.exchange = exchange
        ctx.mark_non_differentiable(routing.selected)
        return out, routing.selected

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, summary_query, out, lse, summaries, *of_routing = ctx.saved_tensors
        shard, spec, stages, traffic = ctx.call.shard, ctx.call.spec, ctx.call.stages, ctx.call.traffic
        delivery = ctx.delivery or ctx.exchange.deliver(k, v, traffic)
        queries = Queries(q, shard.chunks, summaries, Routing(*of_routing))
        upstream = OutputGradient(grad, lse, stages.row_dots(grad, out))
        sums = None
        for part, last in delivery.parts():
            if last:
                dq, ratio = stages.finish_query_gradient(queries, upstream, part, spec, sums)
            else:
                sums = stages.query_gradient(queries, upstream, part, spec, sums)
        dsummary_query = torch.zeros(summary_query.shape, dtype=summaries.dtype, device=q.device)

        def contribution_to(part: Part | Blocks) -> torch.Tensor:
            dkv, of_part = stages.key_gradient(queries, upstream, ratio, part, summary_query, spec)
            dsummary_query.add_(of_part)
            return dkv

        dk, dv = delivery.gradients(contribution_to)
        grads = dq, dk.to(k.dtype), dv.to(v.dtype), dsummary_query.to(summary_query.dtype)
        return *grads, None, None

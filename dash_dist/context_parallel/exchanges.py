"""The stages of `dash_kernels` composed with each way that K and V travel: what is computed when which tensor is there.

`ring` and `allgather` know how the tensors move, the backends what is computed on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dash_dist.context_parallel import allgather, ring
from dash_dist.context_parallel.shard import Shard
from dash_kernels.backend import Backend
from dash_kernels.spec import AttentionSpec, GradientSums, Part, Routing


@dataclass(frozen=True)
class Call:
    """One rank's call: its shard of q [B, S, Hq, D], k and v [B, S, Hkv, D], and summary_query [Hkv, D]; the summaries
    [B, n, Hkv, D] of the whole sequence, and the routing of q.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    summary_query: torch.Tensor
    summaries: torch.Tensor
    routing: Routing
    shard: Shard
    spec: AttentionSpec
    stages: Backend


class Exchange(Protocol):
    def attend(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of the rank's queries [B, S, Hq, D], in q's dtype, and its log-sum-exp [B, S, Hq]."""
        ...

    def backward(
        self, call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of the rank's q, in its dtype, of its k and v [2, *k.shape], summed over all ranks' queries,
        and this rank's part of that of summary_query [Hkv, D], the last two in the accumulation dtype.
        """
        ...


class Ring:
    """K and V come part by part. Outputs merge by log-sum-exp; the gradients that need whole rows wait for the end."""

    def attend(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for part in ring.parts(call.k, call.v, call.shard):
            result = call.stages.attend(call.q, call.shard.chunks, part, call.summaries, call.routing, call.spec)
            merged = result if merged is None else _merge(*merged, *result)
        assert merged is not None  # the ring has at least one rank
        return merged[0].to(call.q.dtype), merged[1]

    def backward(
        self, call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, chunks, summaries, routing, spec = call.q, call.shard.chunks, call.summaries, call.routing, call.spec
        sums = GradientSums.zeros(q, summaries)
        delta = call.stages.row_dots(grad, out)
        dsummary_query = torch.zeros_like(call.summary_query, dtype=summaries.dtype)

        def contribution(part: Part) -> torch.Tensor:
            dkv, part_dsummary_query = call.stages.attend_backward(
                grad, q, chunks, part, call.summary_query, summaries, routing, lse, delta, spec, sums
            )
            dsummary_query.add_(part_dsummary_query)
            return dkv

        dkv = ring.backward(call.k, call.v, call.shard, contribution)
        call.stages.route_backward(q, chunks, summaries, routing, spec, sums)
        dsummaries = call.shard.reduce_summary_gradient(sums.dsummaries)
        dsummary_query += call.stages.summarize_backward(dsummaries, call.k, chunks, call.summary_query, spec, dkv[0])
        return sums.dq.to(q.dtype), dkv, dsummary_query


class AllGather:
    """Every rank holds all of K and V while it computes; in the backward pass they are gathered again, not kept."""

    def attend(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        everything = allgather.gather(call.k, call.v, call.shard)
        return call.stages.attend(call.q, call.shard.chunks, everything, call.summaries, call.routing, call.spec)

    def backward(
        self, call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        everything = allgather.gather(call.k, call.v, call.shard)
        dq, contribution, dsummary_query = call.stages.backward_whole(
            grad,
            call.q,
            call.shard.chunks,
            everything,
            call.summary_query,
            call.summaries,
            call.routing,
            out,
            lse,
            call.spec,
        )
        return dq, allgather.reduce(contribution, call.shard), dsummary_query


EXCHANGES: dict[str, Exchange] = {"ring": Ring(), "allgather": AllGather()}


def check_exchange(exchange: str) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}: give one of {', '.join(EXCHANGES)}")


def _merge(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a part to a result whose lse is finite; the first part is the own one, where a token finds itself."""
    total = torch.logaddexp(lse, part_lse)
    weight, part_weight = torch.exp(lse - total).unsqueeze(-1), torch.exp(part_lse - total).unsqueeze(-1)
    return out * weight + part_out * part_weight, total

"""What every stage needs to know about the function: its constants, a part of K and V, the routing that was found.

Knows the definitions; does not know how a backend computes them, nor that ranks exist.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from dash_kernels.chunks import ChunkGrid

# dP = dB / P is computed as dB / max(P, PRIOR_FLOOR), in the reference as in every backend. For prior_sigma=None the
# floor never matters (dB is proportional to P); for prior_sigma > 2 the quotient grows without bound at the edge of the
# support, where float32 cannot tell P from zero: x - tau is known to about 1e-6, so P below 1e-12 is rounding noise.
PRIOR_FLOOR = 1e-12


@dataclass(frozen=True)
class AttentionSpec:
    """The constants of one call. `scale` is softmax_scale, 1 / sqrt(head_dim) unless the caller chose another."""

    chunk_size: int
    alpha: float
    routing_scale: float
    prior_sigma: float | None
    scale: float

    @property
    def routing_logit_scale(self) -> float:
        """Factor of q . s in the routing logits z."""
        return self.routing_scale * self.scale

    @property
    def prior_exponent(self) -> float:
        """Factor of log P in the bias: 1 / prior_sigma, or 1 when the prior is taken as it is."""
        return 1.0 if self.prior_sigma is None else 1.0 / self.prior_sigma


@dataclass(frozen=True)
class Part:
    """A part of the sequence's K and V: all heads of some chunks.

    k, v:   [B, S, Hkv, D]
    chunks: where their chunks are, S tokens.
    """

    k: torch.Tensor
    v: torch.Tensor
    chunks: ChunkGrid


@dataclass(frozen=True)
class Blocks:
    """A part of the sequence's K and V: single blocks, each a complete chunk of one KV head of one sequence.

    kv:        [blocks, 2, C, D], contiguous: K, then V.
    addresses: int64 [blocks], (batch x Hkv + KV head) x n + chunk id, each at most once; n chunks in the sequence.
    """

    kv: torch.Tensor
    addresses: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """What stage 2 leaves behind for a tensor of queries [B, T, Hq, D]: enough to recompute every P_ij.

    tau:       [B, T, Hq] threshold in the space of x = (alpha - 1) z; p = max(0, x - tau)^(1 / (alpha - 1)).
    log_mean:  [B, T, Hkv] mean of log P over the routed chunks, zeros unless prior_sigma is set.
    selected:  [B, T, Hkv] int32, number of selected chunks, the own chunk included.
    masks:     what a backend keeps of the selection beside them, for its own later stages: a bit per tile of queries
               and chunk in Triton, bool [B, Hkv, n] over all queries in eager.
    """

    tau: torch.Tensor
    log_mean: torch.Tensor
    selected: torch.Tensor
    masks: torch.Tensor


@dataclass(frozen=True)
class Queries:
    """Queries that have been routed.

    q:         [B, T, Hq, D]
    chunks:    where their chunks are, T tokens.
    summaries: [B, n, Hkv, D] of the whole sequence, by chunk id, in the accumulation dtype.
    """

    q: torch.Tensor
    chunks: ChunkGrid
    summaries: torch.Tensor
    routing: Routing


@dataclass(frozen=True)
class OutputGradient:
    """What the backward pass knows of every row before it begins.

    grad:  [B, T, Hq, D] of the finished output.
    lse:   [B, T, Hq] log-sum-exp over all parts, never -inf: a token attends to itself.
    delta: [B, T, Hq] `row_dots` of grad and the output.
    """

    grad: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor


@dataclass(frozen=True)
class QueryGradient:
    """The gradient of the queries as far as the parts so far give it, in the accumulation dtype.

    dq:           [B, T, Hq, D] without the term of the row sums, see `eager.query_gradients`.
    weighted_sum: [B, T, Hq] sum of u dp over the chunks of these parts.
    slope_sum:    [B, T, Hq] sum of u over the chunks of these parts.
    """

    dq: torch.Tensor
    weighted_sum: torch.Tensor
    slope_sum: torch.Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """How sparse a call was.

    selected_per_token:  [B, T, Hkv] int32, selected chunks of every token, the own chunk included.
    available_per_token: [T] int32, chunks a token could select: the earlier ones of its document and its own.
    """

    selected_per_token: torch.Tensor
    available_per_token: torch.Tensor

    @functools.cached_property
    def density(self) -> torch.Tensor:
        """Selected / available chunks, each summed over all tokens and KV heads; 0-d, float64."""
        batch, _, heads = self.selected_per_token.shape
        available = self.available_per_token.sum(dtype=torch.float64) * (batch * heads)
        return self.selected_per_token.sum(dtype=torch.float64) / available


def routing_statistics(selected: torch.Tensor, query_chunks: ChunkGrid) -> RoutingStatistics:
    """Statistics of the queries that `query_chunks` places in the sequence, from `Routing.selected`."""
    ids, _, lengths, firsts = query_chunks.on(selected.device)
    # With the output's size given, a GPU need not be asked for it.
    available = (ids - firsts + 1).repeat_interleave(lengths, output_size=query_chunks.tokens)
    return RoutingStatistics(selected, available)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of reductions and partial results: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32

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
    """A part of the sequence's K and V.

    k, v:   [B, S, Hkv, D]
    chunks: where their chunks are, S tokens.
    whole:  every chunk that any of the queries may attend to is in it.
    """

    k: torch.Tensor
    v: torch.Tensor
    chunks: ChunkGrid
    whole: bool


@dataclass(frozen=True)
class Routing:
    """What stage 2 leaves behind for a tensor of queries [B, T, Hq, D]: enough to recompute every P_ij.

    tau:       [B, T, Hq] threshold in the space of x = (alpha - 1) z; p = max(0, x - tau)^(1 / (alpha - 1)).
    log_mean:  [B, T, Hkv] mean of log P over the routed chunks, zeros unless prior_sigma is set.
    selected:  [B, T, Hkv] int32, number of selected chunks, the own chunk included.
    masks:     what the Triton backend keeps of the selection: a bit per tile of queries and chunk; None in eager.
    """

    tau: torch.Tensor
    log_mean: torch.Tensor
    selected: torch.Tensor
    masks: torch.Tensor | None = None


@dataclass(frozen=True)
class GradientSums:
    """What all parts of K and V add to in the backward pass, in place; contiguous, in the accumulation dtype.

    dq:           [B, T, Hq, D]
    dsummaries:   [B, n, Hkv, D] by chunk id: what `route_backward` adds, the term with the row sums.
    weighted_sum: [B, T, Hq] sum over chunks of u dp, where u = p^(2 - alpha); see `eager.route_backward`.
    """

    dq: torch.Tensor
    dsummaries: torch.Tensor
    weighted_sum: torch.Tensor

    @classmethod
    def zeros(cls, q: torch.Tensor, summaries: torch.Tensor) -> GradientSums:
        # Not zeros_like, which would take over the strides of a transposed q: the kernels address contiguous memory.
        shapes = (q.shape, summaries.shape, q.shape[:3])
        return cls(*(torch.zeros(shape, dtype=summaries.dtype, device=q.device) for shape in shapes))


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

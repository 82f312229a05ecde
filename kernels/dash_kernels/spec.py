"""Data types of the attention: its constants, parts of K and V, routed queries and their gradients.

Knows the definitions of docs/algorithm.md; does not know how a backend computes them, nor that ranks exist.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch

from dash_kernels.chunks import ChunkGrid
from dash_kernels.selection import SelectionRule

# dP = dB / P is computed as dB / max(P, PRIOR_FLOOR), in the reference as in every backend. For prior_sigma=None the
# floor never matters (dB is proportional to P). For prior_sigma > 2 the quotient grows without bound at the edge of the
# support, where float32 cannot tell P from zero: x - tau is known to about 1e-6, so P below 1e-12 is rounding noise.
PRIOR_FLOOR = 1e-12

MIN_CHUNK, MAX_CHUNK, CHUNK_STEP = 16, 128, 16


class AttentionSettings(TypedDict, total=False):
    """Keywords that every public call accepts in place of an `AttentionSpec`, with the meaning of its fields."""

    chunk_size: int
    alpha: float
    routing_scale: float
    prior_sigma: float | None
    softmax_scale: float | None
    attend_first_chunk: bool


@dataclass(frozen=True)
class AttentionSpec:
    """Constants of the function. Raises ValueError for a value outside the range below.

    Attributes:
        chunk_size: tokens routed as one, a multiple of 16 from 16 to 128.
        alpha: exponent of the entmax, in (1, 2]; 1.5 is the fast path, 2 is sparsemax.
        routing_scale: positive factor of the routing logits; larger is sparser. 0 selects every chunk: with
            prior_sigma, whose bias is then 0, this is dense attention.
        prior_sigma: None for the bias log P; a positive number for (log P - mean log P) / prior_sigma.
        softmax_scale: positive factor of q . k in all three stages; None for 1 / sqrt(head_dim).
        attend_first_chunk: every query attends to the first chunk of its document as to its own, without a bias, and
            routing takes place among the chunks between them. An option beside the published function.
        selection: None for DashAttention's routing; else the rule that selects the chunks in its place. The scores then
            have no bias, no gradient passes through the selection, and alpha and prior_sigma are not read.
    """

    chunk_size: int = 64
    alpha: float = 1.5
    routing_scale: float = 1.0
    prior_sigma: float | None = None
    softmax_scale: float | None = None
    attend_first_chunk: bool = False
    selection: SelectionRule | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.chunk_size, int)
            and MIN_CHUNK <= self.chunk_size <= MAX_CHUNK
            and self.chunk_size % CHUNK_STEP == 0,
            f"chunk_size is {self.chunk_size!r}: give a multiple of {CHUNK_STEP} from {MIN_CHUNK} to {MAX_CHUNK}",
        )
        require(
            _is_positive(self.alpha) and 1 < self.alpha <= 2,
            f"alpha is {self.alpha!r}: give a number in (1, 2]; 1.5 is the default and the fast path",
        )
        require(
            _is_positive(self.routing_scale) or (self.routing_scale == 0 and self.prior_sigma is not None),
            f"routing_scale is {self.routing_scale!r}: give a positive number, or 0 with a prior_sigma",
        )
        require(
            self.prior_sigma is None or _is_positive(self.prior_sigma),
            f"prior_sigma is {self.prior_sigma!r}: give None or a positive number",
        )
        require(
            self.softmax_scale is None or _is_positive(self.softmax_scale),
            f"softmax_scale is {self.softmax_scale!r}: give None for 1 / sqrt(head_dim), or a positive number",
        )
        require(
            isinstance(self.attend_first_chunk, bool),
            f"attend_first_chunk is {self.attend_first_chunk!r}: give True or False",
        )
        require(
            not (self.attend_first_chunk and self.selection),
            f"attend_first_chunk is True, and {self.selection} selects chunks by a rule of its own: leave it False",
        )

    def replaced(self, **settings: Unpack[AttentionSettings]) -> AttentionSpec:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **settings) if settings else self

    def for_head_dim(self, head_dim: int) -> AttentionSpec:
        """The same function with softmax_scale as a number, which the stages need."""
        return self if self.softmax_scale is not None else self.replaced(softmax_scale=1 / math.sqrt(head_dim))

    @property
    def scale(self) -> float:
        """softmax_scale, once `for_head_dim` has set it."""
        assert self.softmax_scale is not None, "call for_head_dim first"
        return self.softmax_scale

    @property
    def routing_logit_scale(self) -> float:
        """Factor of q . s in the routing logits z."""
        return self.routing_scale * self.scale

    @property
    def prior_exponent(self) -> float:
        """Factor of log P in the bias: 1 / prior_sigma, or 1 without prior_sigma."""
        return 1.0 if self.prior_sigma is None else 1.0 / self.prior_sigma


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


@dataclass(frozen=True)
class Part:
    """Part of the sequence's K and V: all heads of some chunks.

    k, v:   [B, S, Hkv, D]
    chunks: positions of their chunks, S tokens.
    """

    k: torch.Tensor
    v: torch.Tensor
    chunks: ChunkGrid


@dataclass(frozen=True)
class Blocks:
    """Part of the sequence's K and V: single blocks, each a complete chunk of one KV head of one sequence.

    kv:        [blocks, 2, C, D], contiguous: K, then V.
    addresses: int64 [blocks], (batch x Hkv + KV head) x n + chunk id, each at most once; n chunks in the sequence.
    """

    kv: torch.Tensor
    addresses: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """Result of stage 2 for queries [B, T, Hq, D]: enough to recompute every P_ij.

    tau:       [B, T, Hq] threshold in the space of x = (alpha - 1) z; p = max(0, x - tau)^(1 / (alpha - 1)).
    log_mean:  [B, T, Hkv] mean of log P over the routed chunks, zeros unless prior_sigma is set.
    selected:  [B, T, Hkv] int32, number of selected chunks, the own chunk included.
    masks:     selection in a form private to the backend, for its own later stages: a bit per tile of queries and chunk
               in Triton, bool [B, Hkv, n] over all queries in eager.
    lists:     [B, T, Hkv, k] int32, ids of the earlier chunks that a token selected, ascending, n beyond the last one;
               tau and log_mean are then empty. None where the thresholds say it.
    """

    tau: torch.Tensor
    log_mean: torch.Tensor
    selected: torch.Tensor
    masks: torch.Tensor
    lists: torch.Tensor | None = None

    def listed(self, tokens: slice, n: int) -> torch.Tensor:
        """Marks of the chunks in the lists of some tokens, bool [B, Hkv, tokens, n]."""
        assert self.lists is not None
        lists = self.lists[:, tokens].transpose(1, 2)
        marks = torch.zeros(*lists.shape[:-1], n + 1, dtype=torch.bool, device=lists.device)
        return marks.scatter_(-1, lists.long(), True)[..., :n]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields in their order, to be saved for a backward pass."""
        return self.tau, self.log_mean, self.selected, self.masks, self.lists


@dataclass(frozen=True)
class Queries:
    """Routed queries.

    q:         [B, T, Hq, D]
    chunks:    positions of their chunks, T tokens.
    summaries: [B, n, Hkv, D] of the whole sequence, by chunk id, in the accumulation dtype. With lists of chunks, only
               n, Hkv and the dtype are read.
    """

    q: torch.Tensor
    chunks: ChunkGrid
    summaries: torch.Tensor
    routing: Routing


@dataclass(frozen=True)
class OutputGradient:
    """Inputs of the backward pass per row.

    grad:  [B, T, Hq, D] gradient of the finished output.
    lse:   [B, T, Hq] log-sum-exp over all parts, never -inf: a token attends to itself.
    delta: [B, T, Hq] `row_dots` of grad and the output.
    """

    grad: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor


@dataclass(frozen=True)
class QueryGradient:
    """Gradient of the queries over the parts so far, in the accumulation dtype.

    dq:           [B, T, Hq, D] without the term of the row sums, see `eager.query_gradient`.
    weighted_sum: [B, T, Hq] sum of u dp over the chunks of these parts.
    slope_sum:    [B, T, Hq] sum of u over the chunks of these parts.
    """

    dq: torch.Tensor
    weighted_sum: torch.Tensor
    slope_sum: torch.Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """Sparsity of a call.

    Attributes:
        selected_per_token: [B, T, Hkv] int32, selected chunks of every token, the own chunk included.
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
    """Statistics of queries in the chunks `query_chunks`, from `Routing.selected`."""
    ids, _, lengths, firsts = query_chunks.on(selected.device)
    # output_size avoids a synchronisation with the GPU.
    available = (ids - firsts + 1).repeat_interleave(lengths, output_size=query_chunks.tokens)
    return RoutingStatistics(selected, available)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of reductions and partial results: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32

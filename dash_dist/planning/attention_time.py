"""Seconds of the DashAttention kernels on one rank's queries, stage by stage, from the measured ones.

Knows what each stage's time is proportional to. Does not know ranks nor layers.

With P = pairs of a query head's token and an available chunk, S = those selected, W = those that a tile walks because
one of its tokens selected them, R = rows (token and query head), all of one rank, an H200 takes

    route      ROUTE_ROW x R + (ROUTE_PAIR + ROUTE_DENSITY x density) x P
    attend     ATTEND_ROW x R + ATTEND x W
    queries    QUERIES_ROW x R + QUERIES x W
    keys       KEYS x S + KEYS_PAIR x P / (query heads of a KV head)
    window     WINDOW_FORWARD, WINDOW_BACKWARD x R x the tokens that a token attends to
    first      FIRST_CHUNK_FORWARD, FIRST_CHUNK_BACKWARD x R

at head_dim 128 and chunks of 64; products of the others take `_head_factor`, routing is bound by its scores. Long
sequences are slower per pair: K and V no longer stay in the cache, see `_length_factor`.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.selection import tile_efficiency

# Fitted by least squares of the relative errors to docs/results/h100_64k_gathered.json, whose H100 takes 1.02 of an
# H200's time: (32, 2) and (32, 8) heads, density 0.05, 0.25 and 1, T = 65536. Each stage is met within 10 %. ROUTE_ROW
# needs several lengths, and is from cp_2xh200.json and cp_2xh200_long.json.
ROUTE_ROW = 0.65e-9
ROUTE_PAIR = 1.92e-12
ROUTE_DENSITY = 2.88e-12
ROUTE_DENSEST = 0.55
"""Routing does not grow beyond this density: all chunks are listed (density 1)."""
ATTEND_ROW = 0.487e-9
ATTEND = 0.0627e-9
QUERIES_ROW = 0.897e-9
QUERIES = 0.0844e-9
KEYS = 0.154e-9
KEYS_PAIR = 0.0188e-9
# `torch.nn.attention.varlen` of PyTorch 2.11 on one H200, T = 65536, (32, 8) heads, window 4096: 14.9 and 36.6 ms.
WINDOW_FORWARD = 1.8e-12
WINDOW_BACKWARD = 4.4e-12
# `--attend-first-chunk` of the kernel benchmark on one H200, T = 131072, (32, 8) heads of 128, densities 0.05 and 0.01:
# 2.7 and 2.8 ms forward, 7.7 and 6.5 ms backward more. A row of (9, 3) heads of 64 at T = 65536 takes 0.4 and 4.5 ns.
FIRST_CHUNK_FORWARD = 0.65e-9
FIRST_CHUNK_BACKWARD = 1.7e-9
BACKWARD_OTHERS = 0.02
"""Row sums and conversions, of the backward pass."""

# Time per pair over that at T = 65536, forward and backward: cp_2xh200.json, cp_2xh200_long.json, density 0.25.
_LENGTHS = ((2**16, 1.0, 1.0), (2**17, 1.03, 1.04), (2**18, 1.06, 1.06), (2**19, 1.165, 1.09), (2**20, 1.29, 1.13))
_HEAD_DIM, _CHUNK = 128, 64
_FIXED_SHARE = 0.35
"""Of a pair's time that does not depend on the head dim. Assumed; heads of 64 agree (docs/planning.md)."""


@dataclass(frozen=True)
class AttentionTime:
    """Seconds of one layer and micro-batch on an H200. route: stages 1 and 2."""

    route: float
    attend: float
    backward: float


def attention_time(sizes: Sizes, assumptions: Assumptions, *, sequence_length: int) -> AttentionTime:
    """Predict the seconds of one rank's queries against all chunks that they may select, on any rank."""
    rows = sizes.tokens * sizes.query_heads
    pairs = rows * sizes.chunks_per_token
    selected = assumptions.density * pairs
    walked = selected / tile_efficiency(sizes.tile_tokens, assumptions)
    scale = _head_factor(sizes) * sizes.chunk_size / _CHUNK
    forward_length, backward_length = _length_factor(min(sizes.document, sequence_length))
    density = min(assumptions.density, ROUTE_DENSEST)
    products = QUERIES * walked + KEYS * selected + KEYS_PAIR * pairs / sizes.group
    return AttentionTime(
        route=ROUTE_ROW * rows + (ROUTE_PAIR + ROUTE_DENSITY * density) * pairs,
        attend=ATTEND_ROW * rows + ATTEND * walked * scale * forward_length,
        backward=(QUERIES_ROW * rows + products * scale * backward_length) * (1 + BACKWARD_OTHERS),
    )


def with_first_chunks(time: AttentionTime, sizes: Sizes) -> AttentionTime:
    """Add the pass over the first chunks of documents; density counts these chunks."""
    rows = sizes.tokens * sizes.query_heads
    return AttentionTime(
        route=time.route,
        attend=time.attend + FIRST_CHUNK_FORWARD * rows,
        backward=time.backward + FIRST_CHUNK_BACKWARD * rows,
    )


def window_time(sizes: Sizes, attended: float) -> AttentionTime:
    """Predict the seconds of one rank's queries that attend to `attended` tokens each, on average."""
    pairs = sizes.tokens * sizes.query_heads * attended * _head_factor(sizes)
    return AttentionTime(route=0.0, attend=WINDOW_FORWARD * pairs, backward=WINDOW_BACKWARD * pairs)


def _head_factor(sizes: Sizes) -> float:
    padded = max(1 << (sizes.head_dim - 1).bit_length(), 16)
    return _FIXED_SHARE + (1 - _FIXED_SHARE) * padded / _HEAD_DIM


def _length_factor(tokens: float) -> tuple[float, float]:
    place = bisect.bisect([length for length, *_ in _LENGTHS], tokens)
    if place in (0, len(_LENGTHS)):
        _, forward, backward = _LENGTHS[min(place, len(_LENGTHS) - 1)]
        return forward, backward
    (low, *below), (high, *above) = _LENGTHS[place - 1], _LENGTHS[place]
    share = math.log(tokens / low) / math.log(high / low)
    forward, backward = (x + (y - x) * share for x, y in zip(below, above, strict=True))
    return forward, backward

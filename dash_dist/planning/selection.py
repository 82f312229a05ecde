"""Union of the chunks that neighbouring tokens select: a tile of the kernels reads it, a shard fetches it.

Knows densities. Does not know bytes nor seconds.
"""

from __future__ import annotations

import bisect
import math

from dash_dist.planning.assumptions import Assumptions

# Of the benchmarks' inputs: tokens -> as how many tokens that select independently of each other they reach chunks,
# g in union = 1 - (1 - density)^g. From the tile efficiencies of docs/kernel-log.md (4 and 16 tokens) and the measured
# coverage in docs/results/cp_2xh200_long.json (128 tokens and more).
_ALIKE = {
    0.05: (
        (1, 1.0), (4, 1.47), (16, 2.52), (128, 6.95), (256, 12.6), (512, 23.5), (1024, 42.3), (2048, 78.0),
        (4096, 139.0),
    ),
    0.25: ((1, 1.0), (4, 1.30), (16, 1.94), (128, 4.82), (256, 8.37), (512, 15.5), (1024, 28.2)),
}  # fmt: skip


def union(tokens: float, assumptions: Assumptions) -> float:
    """Share of the chunks available to them that `tokens` neighbouring tokens select between them."""
    density = assumptions.density
    if density >= 1.0:
        return 1.0
    return 1.0 - (1.0 - density) ** _independent(tokens, assumptions)


def tile_efficiency(tile_tokens: int, assumptions: Assumptions) -> float:
    """Selected / walked pairs of a token and a chunk in a tile of so many tokens."""
    return assumptions.density / union(tile_tokens, assumptions)


def shard_coverage(tokens: float, assumptions: Assumptions) -> float:
    """Share of the chunks of other ranks that `tokens` neighbouring tokens select between them."""
    return union(tokens, assumptions) if assumptions.coverage is None else assumptions.coverage


def _independent(tokens: float, assumptions: Assumptions) -> float:
    """As how many independently selecting tokens they reach chunks: between the benchmarks' and their own number."""
    (sparse, below), (dense, above) = _ALIKE.items()
    share = (math.log(assumptions.density) - math.log(sparse)) / (math.log(dense) - math.log(sparse))
    share = min(max(share, 0.0), 1.0)
    alike = _interpolate(tokens, below) ** (1 - share) * _interpolate(tokens, above) ** share
    return alike ** (1 - assumptions.independence) * max(tokens, 1.0) ** assumptions.independence


def _interpolate(tokens: float, table: tuple[tuple[int, float], ...]) -> float:
    """By logarithms of both; beyond the table in proportion to the tokens."""
    if tokens <= 1:
        return 1.0
    place = bisect.bisect([measured for measured, _ in table], tokens)
    if place == len(table):
        last, value = table[-1]
        return value * tokens / last
    (low, below), (high, above) = table[place - 1], table[place]
    share = math.log(tokens / low) / math.log(high / low)
    return below ** (1 - share) * above**share

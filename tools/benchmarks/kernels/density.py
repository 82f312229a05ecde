"""The routing_scale at which a case has the density that was asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from tools.benchmarks.common.inputs import SHARED_IN_CHUNK, Case

AIM, TOLERANCE = 0.02, 0.10  # relative; the search continues until the aim, or ends within the tolerance
MAX_STEPS = 14
# Routing logits 1e-4 apart: far below the 1 / sqrt(n) that separates a chunk from the edge of the support.
FLAT_ROUTING_SCALE = 1e-4


def find_routing_scale(density_at: Callable[[float], float], case: Case, aim: float = AIM) -> float:
    """The routing_scale with a density within TOLERANCE, and within `aim` if that is found, of case.asked_density.

    density_at is one evaluation of the routing. Density falls as the scale grows: a bracket is found by factors of 2
    from the Gaussian estimate, then narrowed where a line in log scale and log density says, kept off its ends.

    Raises ValueError where no scale gives the density: every token selects its own chunk and at least one earlier one,
    which bounds it from below on short sequences.
    """
    asked = case.asked_density
    if asked == 1:
        _check(density_at(FLAT_ROUTING_SCALE), case, FLAT_ROUTING_SCALE)
        return FLAT_ROUTING_SCALE
    measured: dict[float, float] = {}  # log scale -> log (density / asked)
    place = math.log(gaussian_estimate(case))
    for _ in range(MAX_STEPS):
        measured[place] = math.log(density_at(math.exp(place)) / asked)
        if abs(measured[place]) <= aim:
            break
        place = _next_place(measured)
    best = min(measured, key=lambda at: abs(measured[at]))
    scale = math.exp(best)
    _check(asked * math.exp(measured[best]), case, scale)
    return scale


def _next_place(measured: dict[float, float]) -> float:
    too_dense = [at for at, excess in measured.items() if excess > 0]
    too_sparse = [at for at, excess in measured.items() if excess <= 0]
    if not too_sparse:
        return max(too_dense) + math.log(2)
    if not too_dense:
        return min(too_sparse) - math.log(2)
    low, high = max(too_dense), min(too_sparse)
    share = measured[low] / (measured[low] - measured[high])
    return low + (high - low) * min(max(share, 0.1), 0.9)


def gaussian_estimate(case: Case) -> float:
    """routing_scale for the density, were the routing scores of a row independent normal numbers and heads alone.

    x = z / 2 of standard deviation s selects the share d above tau = a s, with a the normal quantile of 1 - d, and the
    probabilities of n chunks sum to one: n s^2 E[(u - a)+^2] = 1.
    """
    normal = statistics.NormalDist()
    edge = normal.inv_cdf(1 - case.asked_density)
    excess = (1 + edge**2) * (1 - normal.cdf(edge)) - edge * normal.pdf(edge)
    chunks = max(case.seq_len / case.chunk_size / 2, 1)  # of a token in the middle
    deviation = 1 / math.sqrt(chunks * excess)
    return 2 * deviation / math.sqrt(SHARED_IN_CHUNK)


def _check(density: float, case: Case, scale: float) -> None:
    if abs(density / case.asked_density - 1) > TOLERANCE:
        raise ValueError(
            f"density {case.asked_density} is not reachable at {case.seq_len} tokens with chunks of {case.chunk_size}: "
            f"the nearest found is {density:.4f} at routing_scale {scale:.4g}; ask for a density near it"
        )

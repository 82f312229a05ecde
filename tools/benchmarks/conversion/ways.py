"""The ways to convert a dense model, and settings that it is tried with as it is.

Knows attention's settings; does not know how they are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dash_dist.config.attention import AttentionConfig, RoutingWarmup
from dash_dist.config.trainable import TrainablePattern, TrainableSection

SELECTION_ALONE = 1e6
"""A `prior_sigma` with which the prior selects and adds no bias, and routing gets no gradient."""

_FASTER_ROUTING = TrainableSection(
    parameters=(TrainablePattern(match="*.summary_query", lr=1e-2), TrainablePattern(match="*"))
)


@dataclass(frozen=True)
class Way:
    """One way to convert.

    Attributes:
        attention: of the steps after the change.
        after_phase: these steps follow a conversion phase.
        trainable: learning rates of these steps; None for one of all weights.
    """

    attention: AttentionConfig
    after_phase: bool = False
    trainable: TrainableSection | None = None


def ways(dash: AttentionConfig, warmup: RoutingWarmup, prior_sigma: float) -> dict[str, Way]:
    """Return the ways by name.

    Args:
        dash: attention after the change, without warmup or prior_sigma.
        warmup: of the ways with one.
        prior_sigma: of the ways with one, beside `SELECTION_ALONE`.
    """
    warm = {"routing_warmup": warmup}
    found = {
        "dense, continued": Way(AttentionConfig(chunk_size=dash.chunk_size, kind="dense")),
        "straight": Way(dash),
        "warmup": Way(dash.model_copy(update=warm)),
        "phase, then straight": Way(dash, after_phase=True),
        "phase, then warmup": Way(dash.model_copy(update=warm), after_phase=True),
    }
    for sigma in (prior_sigma, SELECTION_ALONE):
        prior = dash.model_copy(update={"prior_sigma": sigma})
        found[f"prior_sigma {sigma:g}"] = Way(prior)
        found[f"prior_sigma {sigma:g}, warmup"] = Way(prior.model_copy(update=warm))
    slow = found[f"prior_sigma {prior_sigma:g}, warmup"]
    found["faster summary_query"] = replace(slow, trainable=_FASTER_ROUTING)
    return found


def chosen(found: dict[str, Way], names: Sequence[str]) -> dict[str, Way]:
    """Return the ways of some names, or all without names. Raises ValueError for one that is not there."""
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"there is no way {', '.join(unknown)}: give some of {'; '.join(found)}")
    return {name: found[name] for name in names} if names else found


def unchanged(dash: AttentionConfig, scales: Iterable[float], prior_sigma: float) -> Iterator[AttentionConfig]:
    """Yield attention for weights that are not trained further: dense, and each scale with each prior."""
    yield AttentionConfig(chunk_size=dash.chunk_size, kind="dense")
    for scale in scales:
        for sigma in (None, prior_sigma, SELECTION_ALONE):
            yield dash.model_copy(update={"routing_scale": scale, "prior_sigma": sigma})

"""The ways to convert a dense model, and settings that it is tried with as it is.

Knows attention's settings; does not know how they are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dash_dist.config.attention import AttentionConfig, InfLLMv2Config, RoutingWarmup
from dash_dist.config.trainable import TrainablePattern, TrainableSection

SELECTION_ALONE = 1e6
"""A `prior_sigma` so large that the prior selects, and its bias and the gradient of routing nearly vanish."""

_OWN_RATE = TrainableSection(
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

    Raises:
        ValueError: a setting is out of range.
    """
    if prior_sigma >= SELECTION_ALONE:
        raise ValueError(f"prior_sigma {prior_sigma:g} is measured anyway: give one below {SELECTION_ALONE:g}")
    found = {
        "dense, continued": Way(dense(dash)),
        "straight": Way(dash),
        "warmup": Way(_changed(dash, routing_warmup=warmup)),
        "phase, then straight": Way(dash, after_phase=True),
        "phase, then warmup": Way(_changed(dash, routing_warmup=warmup), after_phase=True),
    }
    for sigma in (prior_sigma, SELECTION_ALONE):
        prior = _changed(dash, prior_sigma=sigma)
        found[f"prior_sigma {sigma:g}"] = Way(prior)
        found[f"prior_sigma {sigma:g}, warmup"] = Way(_changed(prior, routing_warmup=warmup))
    name = f"prior_sigma {prior_sigma:g}, warmup"
    found[f"{name}, own rate of summary_query"] = replace(found[name], trainable=_OWN_RATE)
    return found


def dense(dash: AttentionConfig) -> AttentionConfig:
    """Return the attention before the change."""
    return AttentionConfig(chunk_size=dash.chunk_size, kind="dense")


def chosen(found: dict[str, Way], names: Sequence[str]) -> dict[str, Way]:
    """Return the ways of some names, or all without names. Raises ValueError for one that is not there."""
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"there is no way {', '.join(unknown)}: give some of {'; '.join(found)}")
    return {name: found[name] for name in names} if names else found


def unchanged(
    dash: AttentionConfig, scales: Iterable[float], budgets: Iterable[int], prior_sigma: float
) -> Iterator[AttentionConfig]:
    """Yield attention for weights that are not trained further, dense first.

    Args:
        dash: as in `ways`.
        scales: each with each prior.
        budgets: chunks of the baselines with a fixed number of them; infllmv2 always has the first one, and the one
            before a token's own.
        prior_sigma: as in `ways`.
    """
    yield dense(dash)
    for scale in scales:
        for sigma in (None, prior_sigma, SELECTION_ALONE):
            yield _changed(dash, routing_scale=scale, prior_sigma=sigma)
    always = InfLLMv2Config(first_chunks=1, local_chunks=1, dense_length=0)
    for chunks in budgets:
        yield AttentionConfig(chunk_size=dash.chunk_size, kind="topk", top_chunks=chunks)
        yield AttentionConfig(chunk_size=dash.chunk_size, kind="infllmv2", top_chunks=chunks, infllmv2=always)


def _changed(attention: AttentionConfig, **settings: Any) -> AttentionConfig:
    return AttentionConfig(**attention.model_dump(exclude_defaults=True) | settings)

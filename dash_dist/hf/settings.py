"""Settings of the attention in a model's config.json, and the models that this attention fits.

Knows the keys of `dash_attention` in a configuration of transformers; does not know modules or tensors.
"""

from __future__ import annotations

import functools
from typing import Any

from dash_kernels import AttentionSpec
from dash_kernels.spec import AttentionSettings

KEY = "dash_attention"
"""Of config.json: a dictionary of `AttentionSettings`."""


def has_settings(config: Any) -> bool:
    """Return whether a configuration is that of a model with DashAttention."""
    return getattr(config, KEY, None) is not None


def spec_of(config: Any) -> AttentionSpec:
    """Constants of the function that a configuration of transformers states.

    Raises ValueError without `dash_attention`, for an unknown key in it, and for a value out of range.
    """
    settings = getattr(config, KEY, None)
    if settings is None:
        raise ValueError(
            f"the model's configuration has no {KEY!r}, so it was not trained with DashAttention: load a folder that "
            "`dash-dist checkpoint export` wrote, or pass another attn_implementation"
        )
    if not isinstance(settings, dict):
        raise ValueError(f"{KEY} in config.json is {settings!r}: give a dictionary such as {{'chunk_size': 64}}")
    unknown = sorted(settings.keys() - AttentionSettings.__annotations__.keys())
    if unknown:
        known = ", ".join(AttentionSettings.__annotations__)
        raise ValueError(
            f"{KEY} in config.json has unknown keys {', '.join(unknown)}: this version knows {known}; update dash-dist"
        )
    return _spec(tuple(sorted(settings.items())))


@functools.cache
def _spec(settings: tuple[tuple[str, Any], ...]) -> AttentionSpec:
    return AttentionSpec(**dict(settings))


def check_model(config: Any) -> None:
    """Refuse, with ValueError, a configuration whose layers are not all plain causal attention with DashAttention."""
    spec_of(config)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None and getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"sliding_window is {config.sliding_window}: DashAttention has no window; set it to null in config.json"
        )
    others = sorted(set(layer_types or ()) - {"full_attention"})
    if others:
        raise ValueError(
            f"layer_types has {', '.join(others)}: a DashAttention model has full_attention in every layer"
        )

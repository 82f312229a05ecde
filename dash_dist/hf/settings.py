"""Settings of the attention in a model's config.json, the kind of each layer, and the models that they fit.

Knows the keys of `dash_attention` in a configuration of transformers; does not know modules or tensors.
"""

from __future__ import annotations

import functools
from typing import Any

from dash_dist.config.attention import Kind
from dash_dist.models.windows import attention_from
from dash_kernels import AttentionSpec
from dash_kernels.spec import AttentionSettings

KEY = "dash_attention"
"""Of config.json: a dictionary of `AttentionSettings`, with the kinds of layers where not all are dash."""

_OF_LAYERS = ("kind", "window")


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
            "`dash-dist export` wrote, or pass another attn_implementation"
        )
    if not isinstance(settings, dict):
        raise ValueError(f"{KEY} in config.json is {settings!r}: give a dictionary such as {{'chunk_size': 64}}")
    unknown = sorted(settings.keys() - AttentionSettings.__annotations__.keys() - set(_OF_LAYERS))
    if unknown:
        known = ", ".join((*AttentionSettings.__annotations__, *_OF_LAYERS))
        raise ValueError(
            f"{KEY} in config.json has unknown keys {', '.join(unknown)}: this version knows {known}; update dash-dist"
        )
    return _spec(tuple(sorted((name, value) for name, value in settings.items() if name not in _OF_LAYERS)))


@functools.cache
def _spec(settings: tuple[tuple[str, Any], ...]) -> AttentionSpec:
    return AttentionSpec(**dict(settings))


def layer_kinds(config: Any) -> tuple[tuple[Kind, ...], int | None]:
    """Return the kind of each layer, and the window of those that have one.

    Raises ValueError for kinds that do not fit the number of layers, and for a window that is missing or not read.
    """
    settings = getattr(config, KEY, None) or {}
    kind = settings.get("kind", "dash")
    return _kinds(kind if isinstance(kind, str) else tuple(kind), settings.get("window"), config.num_hidden_layers)


@functools.cache
def _kinds(kind: str | tuple[str, ...], window: int | None, layers: int) -> tuple[tuple[Kind, ...], int | None]:
    attention = attention_from({"kind": kind, "window": window})
    return attention.kinds(layers), attention.window


def kind_of(module: Any) -> tuple[Kind, int | None]:
    """Return the kind of an attention module, and its window. Raises ValueError as `layer_kinds`."""
    if "kind" not in getattr(module.config, KEY):
        return "dash", None
    kinds, window = layer_kinds(module.config)
    kind = kinds[module.layer_idx]
    return kind, window if kind == "window" else None


def check_model(config: Any) -> None:
    """Refuse, with ValueError, a configuration whose own windows are not those of `dash_attention`."""
    spec_of(config)
    kinds, window = layer_kinds(config)
    types, own = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if types is None:
        types = ["full_attention" if own is None else "sliding_attention"] * len(kinds)
    others = sorted(set(types) - {"full_attention", "sliding_attention"})
    if others:
        raise ValueError(f"layer_types has {', '.join(others)}: dash_attention computes full and sliding attention")
    for layer, (kind, given) in enumerate(zip(kinds, types, strict=False)):
        if given == "sliding_attention" and (kind != "window" or own != window):
            ours = f"a window of {window}" if kind == "window" else f"{kind} attention"
            raise ValueError(
                f"layer {layer} is {given} with sliding_window {own}, and {KEY} makes it {ours}: correct config.json"
            )

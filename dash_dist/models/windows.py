"""Windows of layers in config.json, to and from the section `attention`.

Knows the keys of every family and their defaults in transformers; does not know positions or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dash_dist.config.attention import AttentionConfig, Kind
from dash_dist.config.selection import FIXED_KINDS

SLIDING, FULL = "sliding_attention", "full_attention"
_DEFAULT_WINDOW = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096, "olmo3": 4096}
_SWITCHED = frozenset({"qwen2", "qwen3", "smollm3"})
"""Families whose windows count where `use_sliding_window` is true."""
_DEFAULT_MAX_WINDOW_LAYERS = 28


def layer_windows(config: Mapping[str, Any], without_positions: Sequence[int] = ()) -> list[int | None]:
    """Return the window of each layer of a config.json, None for attention to all earlier tokens.

    Args:
        without_positions: layers whose queries and keys are not rotated.

    Raises:
        ValueError: keys contradict each other, or the family has no windows.
    """
    family, layers = config["model_type"], config["num_hidden_layers"]
    window = config.get("sliding_window", _DEFAULT_WINDOW.get(family))
    if family in _SWITCHED and not config.get("use_sliding_window"):
        window = None
    types = config.get("layer_types")
    if types is not None:
        _check_types(config, types, window)
    if window is None:
        return [None] * layers
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"sliding_window is {window!r} in config.json: a number of tokens is needed")
    if family not in (*_SWITCHED, "mistral", "olmo3"):
        raise ValueError(f"sliding_window is {window}, and model_type {family} has no windows: remove it")
    if types is None:
        types = _implied_types(config, without_positions)
    return [window if kind == SLIDING else None for kind in types]


def _check_types(config: Mapping[str, Any], types: Sequence[str], window: int | None) -> None:
    layers = config["num_hidden_layers"]
    if others := sorted(set(types) - {SLIDING, FULL}):
        raise ValueError(f"layer_types has {others[0]!r}, and only {FULL} and {SLIDING} can be imported")
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries, and num_hidden_layers is {layers}")
    if SLIDING in types and window is None:
        switch = " and use_sliding_window is not true" if config["model_type"] in _SWITCHED else ""
        raise ValueError(f"layer_types has {SLIDING!r}, but sliding_window is not set{switch}: correct one of them")
    if config["model_type"] == "mistral" and window is not None and FULL in types:
        raise ValueError(
            f"layer_types has {FULL!r}, but sliding_window is {window} in every layer of a Mistral: correct one"
        )


def _implied_types(config: Mapping[str, Any], without_positions: Sequence[int]) -> list[str]:
    """Types of the layers of a model with windows that does not list them."""
    family, layers = config["model_type"], range(config["num_hidden_layers"])
    if family == "mistral":
        sliding = set(layers)
    elif family == "olmo3":
        sliding = {layer for layer in layers if (layer + 1) % 4}
    elif family == "smollm3":
        sliding = set(without_positions)
    else:
        sliding = set(layers[config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS) :])
    return [SLIDING if layer in sliding else FULL for layer in layers]


def attention_of(windows: Sequence[int | None], *, others: Kind) -> AttentionConfig:
    """Return the section `attention` of a model with these windows; `others` is the kind of layers without one."""
    sizes = {window for window in windows if window is not None}
    kinds: tuple[Kind, ...] = tuple(others if window is None else "window" for window in windows)
    kind = AttentionConfig(kind=kinds, window=next(iter(sizes), None)).pattern
    return AttentionConfig(kind=kind[0] if len(kind) == 1 else kind, window=next(iter(sizes), None))


def attention_from(function: Mapping[str, Any]) -> AttentionConfig:
    """Return the kinds of layers among settings by name, `kind` and `window`.

    Raises ValueError if they contradict, and for kinds that only this project computes.
    """
    kinds = function.get("kind", "dash")
    if fixed := [kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind in FIXED_KINDS]:
        raise ValueError(
            f"layers of kind {fixed[0]} are computed in training and by `dash-dist evaluate` only: a model for "
            "transformers has layers of kind dash, dense or window"
        )
    try:
        return AttentionConfig.model_validate({name: function[name] for name in ("kind", "window") if name in function})
    except ValidationError as error:
        raise ValueError(str(error.errors(include_url=False)[0]["msg"])) from None


def write_windows(config: dict[str, Any], kinds: Sequence[Kind], window: int | None) -> bool:
    """Add the keys of windows to a config.json, as its family spells them.

    Returns:
        False where the family cannot say which layers have windows: it then reads as a model without any.
    """
    family = config["model_type"]
    windowed = [kind == "window" for kind in kinds]
    if family == "mistral":
        config["sliding_window"] = window if all(windowed) else None  # transformers' own default is a window
        return all(windowed) or not any(windowed)
    if family in _SWITCHED:
        config["use_sliding_window"] = any(windowed)
        if any(windowed):
            config["sliding_window"] = window
            config["layer_types"] = [SLIDING if one else FULL for one in windowed]
            first = windowed.index(True)
            if family != "smollm3":  # of versions of transformers that do not read layer_types
                config["max_window_layers"] = first if all(windowed[first:]) else len(windowed)
        return True
    if family == "olmo3":  # which builds the mask of windows even if no layer has one
        config["sliding_window"] = window or _DEFAULT_WINDOW[family]
        config["layer_types"] = [SLIDING if one else FULL for one in windowed]
        return True
    return not any(windowed)

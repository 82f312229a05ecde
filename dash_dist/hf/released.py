"""The layout of the DashAttention authors' package `dash_attn`, converted to that of an exported folder and back.

Knows names and settings; does not know files. The authors publish three functions under one name (docs/algorithm.md,
"Which DashAttention"): these conversions are exact for the package `dash_attn`, and for no weights of their training
branch or evaluation kernels, which compute something else from the same tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dash_dist.hf.settings import KEY, spec_of

_RELEASED, _OURS = ".self_attn.indexer_q", ".self_attn.summary_query"
_DEFAULTS: dict[str, Any] = {"chunk_size": 64, "estimate_diagonal": False, "sigma": 1.0e6, "scaling_factor": 1.0}
"""The four keys that the package adds to a Llama's config.json, and its values where they are left out."""
_IMPLEMENTATION = ("attn_implementation", "_attn_implementation")
_ALPHA = 1.5  # the package computes no other

StateDict = dict[str, torch.Tensor]
Config = dict[str, Any]


def from_released(tensors: StateDict, config: Config) -> tuple[StateDict, Config]:
    """Convert tensors by name and config.json of `dash_attn` to those of an exported folder.

    `indexer_q`, flat [Hkv * D], becomes `summary_query` [Hkv, D]; the four keys become `dash_attention`. Nothing else
    changes.

    Raises ValueError for a model that is no Llama, one without `indexer_q`, and a setting or shape that does not fit.
    """
    shape = _heads(config)
    converted = {}
    for name, tensor in tensors.items():
        if name.endswith(_RELEASED):
            if tensor.numel() != math.prod(shape):
                raise ValueError(
                    f"{name} has {tensor.numel()} values: {shape[0]} KV heads of {shape[1]} make {math.prod(shape)}"
                )
            name, tensor = name.removesuffix(_RELEASED) + _OURS, tensor.reshape(shape)
        converted[name] = tensor
    _require_some(converted, _OURS, "indexer_q")
    settings = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    kept = {key: value for key, value in config.items() if key not in (*_DEFAULTS, *_IMPLEMENTATION)}
    kept[KEY] = {
        "chunk_size": settings["chunk_size"],
        "alpha": _ALPHA,
        "routing_scale": settings["scaling_factor"],
        "prior_sigma": settings["sigma"] if settings["estimate_diagonal"] else None,
    }
    _spec(kept)
    return converted, kept


def to_released(tensors: StateDict, config: Config) -> tuple[StateDict, Config]:
    """Convert tensors by name and config.json of an exported folder to those of `dash_attn`.

    Raises ValueError for a model that is no Llama, one without `summary_query`, and settings that the package lacks.
    """
    shape = _heads(config)
    spec = _spec(config)
    kind = config[KEY].get("kind", "dash")
    if kind != "dash":
        raise ValueError(f"the layers are of kind {kind}: the released package computes dash in all of them")
    if spec.alpha != _ALPHA:
        raise ValueError(f"alpha is {spec.alpha}: the released package computes {_ALPHA} only")
    if spec.softmax_scale is not None and not math.isclose(spec.softmax_scale, 1 / math.sqrt(shape[1])):
        raise ValueError(f"softmax_scale is {spec.softmax_scale}: the released package computes 1 / sqrt(D) only")
    if spec.attend_first_chunk:
        raise ValueError("attend_first_chunk is true: the released package routes to the first chunk like any other")
    converted = {}
    for name, tensor in tensors.items():
        if name.endswith(_OURS):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
            name, tensor = name.removesuffix(_OURS) + _RELEASED, tensor.flatten()
        converted[name] = tensor
    _require_some(converted, _RELEASED, "summary_query")
    kept = {key: value for key, value in config.items() if key not in (KEY, *_IMPLEMENTATION)}
    return converted, kept | {
        "chunk_size": spec.chunk_size,
        "estimate_diagonal": spec.prior_sigma is not None,
        "sigma": _DEFAULTS["sigma"] if spec.prior_sigma is None else spec.prior_sigma,
        "scaling_factor": spec.routing_scale,
    }


class _Namespace:
    """config.json in the form that `spec_of` reads."""

    def __init__(self, config: Config) -> None:
        self.dash_attention = config.get(KEY)


def _spec(config: Config) -> Any:
    return spec_of(_Namespace(config))


def _heads(config: Config) -> tuple[int, int]:
    """(KV heads, head_dim) of a Llama."""
    if config.get("model_type", "llama") != "llama":
        raise ValueError(f"model_type is {config['model_type']!r}: the released package has Llama models only")
    heads = config["num_attention_heads"]
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def _require_some(tensors: StateDict, suffix: str, looked_for: str) -> None:
    if not any(name.endswith(suffix) for name in tensors):
        raise ValueError(f"no tensor is named *.self_attn.{looked_for}: these are no weights with DashAttention")

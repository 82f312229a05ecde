"""Registration with transformers: the attention and mask functions, and `summary_query` in the attention modules.

Knows where transformers builds and initialises a model; does not know what the attention computes. transformers has no
hook between the construction of a model and the loading of its weights. `register` therefore wraps two methods of
`PreTrainedModel` that every model calls: `post_init`, which adds the parameters, and `_init_weights`, which refuses a
checkpoint without them.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from dash_dist.errors import ConfigError
from dash_dist.hf.attention import attention_forward, padding_bounds
from dash_dist.hf.cache import DashCacheLayer, check_growing
from dash_dist.hf.settings import KEY, check_model, has_settings, kind_of, spec_of

NAME = "dash_attention"
"""Name of the attention in transformers: `attn_implementation`."""

OLDEST, NEWEST = Version("5.0"), Version("6.dev0")
"""Versions of transformers: from OLDEST on, before NEWEST."""

logger = logging.getLogger(__name__)


@functools.cache
def register() -> None:
    """Make `dash_attention` known to transformers; further calls do nothing.

    Raises ConfigError for a version of transformers that was never tested.
    """
    version = Version(transformers.__version__)
    if not OLDEST <= version < NEWEST:
        raise ConfigError(
            f"dash_dist.hf does not know transformers {version}: pip install 'transformers>={OLDEST},<{NEWEST.major}'"
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_bounds)
    post_init, init_weights = PreTrainedModel.post_init, PreTrainedModel._init_weights

    @functools.wraps(post_init)
    def add_and_post_init(self: PreTrainedModel) -> None:
        _add_summary_queries(self)
        post_init(self)

    @functools.wraps(init_weights)
    def init_and_check(self: PreTrainedModel, module: nn.Module) -> None:
        init_weights(self, module)
        _check_loaded(module)

    PreTrainedModel.post_init = add_and_post_init
    PreTrainedModel._init_weights = init_and_check


def load(folder: str | Path, *, routing_scale: float | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model with DashAttention from an exported folder.

    Args:
        folder: with config.json and safetensors, or the name of a model on the hub.
        routing_scale: in place of the trained one; larger selects fewer chunks.
        kwargs: of `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

    Raises ValueError for a model without DashAttention, a missing tensor, or an unknown setting.
    """
    config = AutoConfig.from_pretrained(folder)
    spec = spec_of(config)
    if routing_scale is not None:
        settings = getattr(config, KEY) | {"routing_scale": routing_scale}
        setattr(config, KEY, settings)
        spec = spec_of(config)
    check_model(config)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation=NAME, output_loading_info=True, **kwargs
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors of the model, such as {missing[0]}: export it again")
    logger.debug("loaded %s with %s", folder, spec)
    return model


def _add_summary_queries(model: PreTrainedModel) -> None:
    """Give the attention modules of a DashAttention model `summary_query` [Hkv, D] and their cache, by their kind.

    Raises ValueError if the model should use DashAttention but was not trained with it.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if not _is_attention(module) or config is None or hasattr(module, "_dash_is_ready"):
            continue
        uses = config._attn_implementation == NAME
        if not has_settings(config):
            if uses:
                spec_of(config)  # raises
            continue
        if uses:
            check_model(config)
        else:
            _warn_of_other_attention(config._attn_implementation)
        module._dash_is_ready = True
        module.register_forward_pre_hook(_pass_cache, with_kwargs=True)
        if kind_of(module)[0] != "dash":
            continue
        like = next(module.parameters())
        shape = config.num_key_value_heads, module.head_dim
        zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
        module.register_parameter("summary_query", nn.Parameter(zeros))
        module.summary_query._dash_initialized = True


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("layer_idx", "head_dim", "num_key_value_groups", "scaling"))


def _pass_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the layer's cache to the attention function, through the keyword arguments of the attention module."""
    # The keyword's name differs between versions: past_key_values, or cache.
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is None or module.config._attn_implementation != NAME:
        return args, kwargs
    if "summary_query" in module._parameters:
        return args, kwargs | {"dash_cache": DashCacheLayer.of(cache, module.layer_idx)}
    check_growing(cache, module.layer_idx)
    return args, kwargs


def _check_loaded(module: nn.Module) -> None:
    """Refuse a `summary_query` that transformers is about to initialise because the checkpoint has none."""
    query = module._parameters.get("summary_query")
    if query is None or getattr(query, "_dash_initialized", False) or getattr(query, "_is_hf_initialized", False):
        return
    raise ValueError(
        f"the checkpoint has no summary_query for layer {getattr(module, 'layer_idx', '?')}, so it would not compute "
        "the attention that it was trained with: export it again with `dash-dist export`"
    )


@functools.cache
def _warn_of_other_attention(implementation: str) -> None:
    logger.warning(
        "a model trained with DashAttention computes %r attention: pass attn_implementation=%r", implementation, NAME
    )

"""Recomputation of layers or of their parts in the backward pass, as settings of Megatron-core and a layer of its.

Knows the parts of a layer. Does not know which results the attention keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import checkpoint

from dash_dist.config.parallel import RECOMPUTE_MODULES, ParallelConfig, RecomputeModule
from dash_dist.megatron.layer_config import LayerConfig
from dash_dist.megatron.tiled_mlp import TiledLayer
from dash_dist.megatron.unread import is_unread, unread_sum


def recompute_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of a `LayerConfig` by which `parallel.recomputed` is recomputed.

    A layer whose parts are all recomputed is recomputed as one: it keeps its own input, and not that of its MLP.
    """
    match parallel.recomputed:
        case ():
            return {}
        case (part,):
            return {
                "recomputed_part": part,
                "recomputed_layers": parallel.recompute_layers,
                "attention_recompute": "selective" if part == "projections" else "none",
            }
    assert set(parallel.recomputed) == set(RECOMPUTE_MODULES)
    layers = parallel.recompute_layers
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform" if layers is None else "block",  # the first ones of a stage
        "recompute_num_layers": 1 if layers is None else layers,
        "recomputed_layers": layers,
        "attention_recompute": parallel.recompute,
    }


class RecomputableLayer(TiledLayer):
    """A layer of which one part may be recomputed from the residual stream before it."""

    config: LayerConfig

    def __init__(self, config: LayerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.self_attn_bda = functools.partial(_added, config, "projections")
        self.mlp_bda = functools.partial(_added, config, "mlp")

    def _forward_attention(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        forward = functools.partial(super()._forward_attention, **kwargs)
        return self._run("projections", forward, hidden_states)

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = super()._forward_mlp
        if self.rows_of_tile(hidden_states) is not None:
            return forward(hidden_states, *args, **kwargs)  # in tiles, it is computed again anyway
        return self._run("mlp", lambda hidden: forward(hidden, *args, **kwargs), hidden_states)

    def _run(self, part: RecomputeModule, forward: Any, hidden_states: torch.Tensor) -> Any:
        recomputed = self.config.recomputed_part == part and self.config.recomputes_layer(self.layer_number)
        if self.training and recomputed:
            return checkpoint(forward, False, hidden_states)
        return forward(hidden_states)


def _added(config: LayerConfig, part: RecomputeModule, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """Stand for Megatron-core's `get_bias_dropout_add` at the end of a part; there are neither biases nor dropout."""
    if is_unread(config, part):
        return lambda branch, residual, _dropout: unread_sum(residual, branch[0])
    add: Callable[..., torch.Tensor] = get_bias_dropout_add(training, fused)
    return add

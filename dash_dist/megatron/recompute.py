"""Recomputation of layers or of their parts in the backward pass, as settings of Megatron-core and a layer of its.

Knows the parts of a layer. Does not know which results the attention keeps.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint

from dash_dist.config.parallel import RECOMPUTE_MODULES, ParallelConfig, RecomputeModule
from dash_dist.megatron.layer_config import LayerConfig
from dash_dist.megatron.tiled_mlp import TiledLayer


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
                "attention_recompute": "selective" if part == "projections" else "none",
            }
    assert set(parallel.recomputed) == set(RECOMPUTE_MODULES)
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "attention_recompute": parallel.recompute,
    }


class RecomputableLayer(TiledLayer):
    """A layer of which one part may be recomputed from the residual stream before it."""

    config: LayerConfig

    def _forward_attention(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        forward = functools.partial(super()._forward_attention, **kwargs)
        return self._run("projections", forward, hidden_states)

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = super()._forward_mlp
        if self.rows_of_tile(hidden_states) is not None:
            return forward(hidden_states, *args, **kwargs)  # in tiles, it is computed again anyway
        return self._run("mlp", lambda hidden: forward(hidden, *args, **kwargs), hidden_states)

    def _run(self, part: RecomputeModule, forward: Any, hidden_states: torch.Tensor) -> Any:
        if self.training and self.config.recomputed_part == part:
            return checkpoint(forward, False, hidden_states)
        return forward(hidden_states)

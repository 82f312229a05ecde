"""Recomputation of layers or of their parts in the backward pass, as settings of Megatron-core and a layer of its.

Knows the parts of a layer. Does not know which results the attention keeps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from dash_dist.config.parallel import RECOMPUTE_MODULES, ParallelConfig, RecomputeModule
from dash_dist.context_parallel.module import Recompute


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron-core's configuration, and the recomputation that it does not know.

    Attributes:
        attention_recompute: as for `DashAttention`.
        recomputed_part: of each layer, where the rest of it is not recomputed.
    """

    attention_recompute: Recompute = "none"
    recomputed_part: RecomputeModule | None = None

    @property
    def recomputes(self) -> bool:
        """Layers are recomputed, in all or in part."""
        return self.recompute_granularity is not None or self.recomputed_part is not None


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


class RecomputableLayer(TransformerLayer):
    """A layer of which one part may be recomputed from the residual stream before it."""

    config: LayerConfig

    def _forward_attention(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        forward = functools.partial(super()._forward_attention, **kwargs)
        return self._run("projections", forward, hidden_states)

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward = super()._forward_mlp
        return self._run("mlp", lambda hidden: forward(hidden, *args, **kwargs), hidden_states)

    def _run(self, part: RecomputeModule, forward: Any, hidden_states: torch.Tensor) -> Any:
        if self.training and self.config.recomputed_part == part:
            return checkpoint(forward, False, hidden_states)
        return forward(hidden_states)

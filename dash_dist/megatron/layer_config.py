"""Megatron-core's configuration of a model, with what it does not know of this project's layers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from dash_dist.config.parallel import RecomputeModule
from dash_dist.context_parallel.module import Recompute


@dataclass
class LayerConfig(TransformerConfig):
    """Settings of a layer.

    Attributes:
        attention_recompute: as for `DashAttention`.
        recomputed_part: of a layer, where the rest of it is not recomputed.
        recomputed_layers: of each pipeline stage, its first ones; None: all.
        mlp_tile_tokens: tokens that each MLP works on at a time; None: all.
        fp8_linears: products of linears are computed in FP8, see `dash_dist.megatron.fp8`.
    """

    attention_recompute: Recompute = "none"
    recomputed_part: RecomputeModule | None = None
    recomputed_layers: int | None = None
    mlp_tile_tokens: int | None = None
    fp8_linears: bool = False

    @property
    def sequence_shards(self) -> int:
        """Tensor-parallel ranks that the residual stream is split over along the sequence."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    @property
    def recomputes(self) -> bool:
        """Layers are recomputed, in all or in part."""
        return self.recompute_granularity is not None or self.recomputed_part is not None

    def recomputes_layer(self, layer_number: int) -> bool:
        """Tell whether a layer, from 1 in the whole model, is recomputed, in all or in part."""
        place = (layer_number - 1) % (self.num_layers // self.pipeline_model_parallel_size)
        return self.recomputes and (self.recomputed_layers is None or place < self.recomputed_layers)

    def ends_recomputation(self, part: RecomputeModule) -> bool:
        """Tell whether every recomputation that runs a part of a layer ends with it: whole layers and tiles of the MLP
        end with the MLP."""
        return part == "mlp" or self.recomputed_part == part

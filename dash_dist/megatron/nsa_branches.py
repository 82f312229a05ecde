"""Projections of a layer of Native Sparse Attention: keys and values of two more branches, and the gates.

Knows the layer's input, tensor parallelism and rotary angles; does not know the attention between its results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from dash_dist.models.nsa import BRANCHES, nsa_shapes
from dash_kernels.nsa import Branches
from dash_kernels.rotary import rotate


class NSABranches(MegatronModule):
    """Projections of the layer's input beside those of its queries, and of the selected branch's keys and values.

    All are cut along the heads over tensor parallelism. Shapes and the order of rows are those of `nsa_shapes`.
    """

    def __init__(self, config: TransformerConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.kv_heads = config.num_query_groups // tp_group.size()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        shapes = nsa_shapes(
            hidden=config.hidden_size,
            query_heads=config.num_attention_heads // tp_group.size(),
            kv_heads=self.kv_heads,
            head_dim=config.kv_channels,
            bias=config.add_qkv_bias,
        )

        def weight(name: str) -> nn.Parameter:
            made = nn.Parameter(torch.zeros(shapes[f"{BRANCHES}.{name}"], dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(made, is_parallel=True, dim=0, stride=1)
            return made

        self.keys_and_values, self.gates = weight("keys_and_values"), weight("gates")
        self.bias = weight("bias") if config.add_qkv_bias else None

    def forward(
        self,
        hidden: torch.Tensor,
        norm: Callable[[torch.Tensor], torch.Tensor] | None,
        angles: tuple[torch.Tensor, ...],
    ) -> Branches:
        """Project the layer's input.

        Args:
            hidden: [s, b, hidden], the same at every tensor-parallel rank; with sequence parallelism this rank's shard.
            norm: of the layer's keys.
            angles: cosines and sines of the tokens, [s, head_dim / 2] each; none in a layer without positions.
        """
        enter = (
            gather_from_sequence_parallel_region
            if self.config.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        hidden = enter(hidden, group=self.tp_group)
        projected = F.linear(hidden, self.keys_and_values, self.bias).unflatten(-1, (self.kv_heads, 4, -1))
        compressed_k, compressed_v, window_k, window_v = (
            one.transpose(0, 1).contiguous() for one in projected.unbind(3)
        )  # [b, s, Hkv / tp, head_dim]
        if norm is not None:
            compressed_k, window_k = norm(compressed_k), norm(window_k)
        turn = None
        if angles:
            cosines, sines = angles
            turn = cosines, sines
            window_k = rotate(window_k, cosines, sines)
        gates = torch.sigmoid(F.linear(hidden, self.gates)).unflatten(-1, (-1, 3)).transpose(0, 1).contiguous()
        return Branches(compressed_k, compressed_v, window_k, window_v, gates, turn)

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take the keys and values of the selected branch, this rank's rows of Megatron-core's, for the others."""
        for own, given in ((self.keys_and_values, weight), (self.bias, bias)):
            if own is not None and given is not None:
                rows = given.unflatten(0, (self.kv_heads, -1, self.config.kv_channels))[:, -2:]  # key and value
                own.copy_(torch.cat((rows, rows), dim=1).flatten(0, 2))

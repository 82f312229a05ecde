"""Self-attention of a layer: projections, norms of queries and keys, rotary positions, and the attention between them.

Knows the order of a layer's tensors; does not know the kinds of attention, nor how angles come about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from dash_dist.megatron.documents import PackedDocuments
from dash_kernels.rotary import rotate, split_projection


class RotarySelfAttention(SelfAttention):
    """Megatron-core's self-attention, whose queries, keys and values leave the projection rotated and in batch order.

    One pass over memory does what Megatron-core does by slices, copies, rotated halves and concatenations, and its
    gradient is one pass as well. Norms of queries or keys come between the projection and the rotation.

    Args:
        unscaled: layers, from 0 in the whole model, that take the second kind of angles; see `ShardRotaryEmbedding`.
        norms: makers of `q_layernorm` and `k_layernorm` where `config.qk_layernorm` is False; since 0.18, Megatron-core
            refuses them in a specification.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        layer_number: int,
        unscaled: frozenset[int] = frozenset(),
        norms: Mapping[str, Callable[..., torch.nn.Module]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, layer_number=layer_number, **kwargs)
        for name, norm in (norms or {}).items():
            made = norm(config=config, hidden_size=self.hidden_size_per_attention_head, eps=config.layernorm_epsilon)
            setattr(self, name, made)
        self._kind_of_angles = int(layer_number - 1 in unscaled)
        self._has_positions = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
        attention_bias: torch.Tensor | None = None,
        **_of_inference: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of this rank's tokens and heads.

        Args:
            hidden_states: [s, b, hidden].
            attention_mask, attention_bias: None.
            rotary_pos_emb: cosines and sines from `ShardRotaryEmbedding`, [2, kinds, s, head_dim / 2] float32.
            packed_seq_params: the documents packed into the sequence.
            _of_inference: Megatron-core's caches, which are None here.

        Returns:
            [s, b, hidden], and the bias that the layer adds to it, here None.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        kv_heads, head_dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        angles: tuple[torch.Tensor, ...] = ()
        if self._has_positions and rotary_pos_emb is not None:
            angles = tuple(rotary_pos_emb[:, self._kind_of_angles])
        norms = self.q_layernorm, self.k_layernorm
        if all(norm is None or isinstance(norm, IdentityOp) for norm in norms):
            query, key, value = split_projection(mixed, kv_heads, head_dim, *angles)
        else:
            query, key, value = split_projection(mixed, kv_heads, head_dim)
            query, key = (norm(x) for norm, x in zip(norms, (query, key), strict=True))
            if angles:
                query, key = rotate(query, *angles), rotate(key, *angles)
        options: dict[str, Any] = {"attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
        if self.core_attention.branches is not None:
            options["branches"] = self.core_attention.branches(hidden_states, self.k_layernorm, angles)
        attended = self.core_attention(query, key, value, attention_mask, **options)
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(attended)
        return output

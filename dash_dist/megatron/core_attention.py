"""Each layer's kind of attention as the core attention of Megatron-core's SelfAttention.

Knows the layer's tensor order, tensor parallelism and checkpoint sharding. Does not know how K and V travel:
that is `dash_dist.context_parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from dash_dist.config.attention import AttentionConfig, Kind
from dash_dist.config.selection import FIXED_KINDS
from dash_dist.context_parallel import DashAttention, NSAAttention, WindowAttention
from dash_dist.megatron.conversion import Conversion
from dash_dist.megatron.documents import PackedDocuments
from dash_dist.megatron.layer_config import LayerConfig
from dash_dist.megatron.nsa_branches import NSABranches
from dash_kernels import AttentionSpec
from dash_kernels.nsa import Branches
from dash_kernels.selection import NSA, InfLLMv2, SelectionRule, TopChunks

_SUMMARY_QUERY = "attention.summary_query"


def selection_of(config: AttentionConfig, kind: Kind) -> SelectionRule | None:
    """Return the rule by which layers of a kind select chunks; None for DashAttention's routing, or no selection."""
    if kind not in FIXED_KINDS:
        return None
    assert config.top_chunks is not None  # the configuration has checked it
    if kind == "topk":
        return TopChunks(config.top_chunks)
    if kind == "nsa":
        return NSA(config.top_chunks, **config.nsa_rule.model_dump(exclude={"window"}))
    return InfLLMv2(config.top_chunks, **config.infllmv2_rule.model_dump())


def attention_spec(
    config: AttentionConfig, softmax_scale: float | None = None, *, kind: Kind = "dash"
) -> AttentionSpec:
    """Constants of the attention that a run's settings ask for in layers of a kind."""
    return AttentionSpec(
        chunk_size=config.chunk_size,
        alpha=config.alpha,
        routing_scale=config.routing_scale,
        prior_sigma=config.prior_sigma,
        softmax_scale=softmax_scale,
        attend_first_chunk=config.attend_first_chunk and kind == "dash",
        selection=selection_of(config, kind),
    )


class DashCoreAttention(MegatronModule):
    """Causal attention of the layer's kind over a tensor-parallel rank's heads and a context-parallel rank's shard.

    `summary_query` [num_kv_heads / tp, head_dim] is sharded over tensor parallelism together with the KV
    heads. Over context and data parallelism it is replicated, so Megatron reduces its gradient over DP x CP like that
    of every other weight. All weights of an nsa layer are sharded and replicated likewise.

    Args:
        attention: the run's settings; the layer's kind is that of `layer_number`, from 1, in the whole model.
        pg_collection: its `tp` and `cp` groups are used.
        config, layer_number, attn_mask_type, attention_type, cp_comm_type, softmax_scale: arguments that
            SelfAttention passes to every core attention. The types are not read: the mask is always causal, and the
            exchange is that of `attention`.
    """

    def __init__(
        self,
        config: LayerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        attention: AttentionConfig,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        kind = attention.kinds(config.num_layers)[layer_number - 1]
        kv_heads, head_dim = config.num_query_groups // self.tp_group.size(), config.kv_channels
        travel: dict[str, Any] = {
            "layout": attention.layout,
            "ranks_per_node": attention.ranks_per_node,
            "cp_group": pg_collection.cp if pg_collection.cp.size() > 1 else None,
        }
        # A conversion phase computes no gradients of a layer, so what its first pass kept would never be taken.
        recomputed = attention.conversion is None and config.recomputes_layer(layer_number)
        recompute = config.attention_recompute if recomputed else "none"
        self.attention: DashAttention | WindowAttention
        if kind == "window":
            assert attention.window is not None  # the configuration has checked it
            self.attention = WindowAttention(
                kv_heads,
                head_dim,
                attention.window,
                chunk_size=attention.chunk_size,
                softmax_scale=softmax_scale,
                keep_output=recompute == "selective",
                **travel,
            )
        else:
            routed: dict[str, Any] = {
                "backend": attention.backend,
                "exchange": attention.exchange,
                "recompute": recompute,
                **travel,
            }
            spec = attention_spec(attention, softmax_scale, kind=kind)
            if kind == "nsa":
                self.attention = NSAAttention(kv_heads, head_dim, spec, window=attention.nsa_rule.window, **routed)
            else:
                self.attention = DashAttention(kv_heads, head_dim, spec, dense=kind == "dense", **routed)
        self.branches = NSABranches(config, self.tp_group) if kind == "nsa" else None
        """Projections of an nsa layer beside those of every layer."""
        self.conversion: Conversion | None = None
        if attention.conversion is not None and isinstance(self.attention, DashAttention) and kind == "dash":
            self.conversion = Conversion(self.attention, config.num_attention_heads)
        for weight in self.attention.parameters():
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
        branches: Branches | None = None,
    ) -> torch.Tensor:
        """Causal attention within each sequence, or within each document packed into it.

        Args:
            query: [b, s, num_attention_heads / tp, head_dim], s tokens of this rank's shard, after rotary embedding.
            key, value: [b, s, num_kv_heads / tp, head_dim].
            attention_mask, attention_bias: must be None.
            packed_seq_params: the documents packed into the sequence; None for sequences of one document.
            branches: of an nsa layer, from `self.branches`.

        Returns:
            [s, b, num_attention_heads / tp x head_dim]

        Raises:
            ValueError: a mask or a bias was given, or Megatron-core's own PackedSeqParams.
        """
        for name, argument in {"attention_mask": attention_mask, "attention_bias": attention_bias}.items():
            if argument is not None:
                raise ValueError(f"{name} was given, and attention is causal over each document: pass None")
        if packed_seq_params is not None and not isinstance(packed_seq_params, PackedDocuments):
            raise ValueError(f"packed_seq_params is {type(packed_seq_params).__name__}: pass PackedDocuments or None")
        chunks = None if packed_seq_params is None else packed_seq_params.chunks
        if self.conversion is None:
            options = {} if branches is None else {"branches": branches}
            output = self.attention(query, key, value, chunks=chunks, **options)
        else:
            output = self.conversion(query, key, value, chunks, training=self.training)
        return output.flatten(start_dim=2).transpose(0, 1).contiguous()  # a view for one sequence

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Weights for Megatron's distributed checkpoint, cut along the heads.

        Every layer has a `summary_query`, and those of all layers are stacked. Other weights have the layer's number in
        their key, since only nsa layers have them.
        """
        weights = self.state_dict(keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        stacked = {_SUMMARY_QUERY: weights.pop(_SUMMARY_QUERY)}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            stacked, prefix, {_SUMMARY_QUERY: 0}, sharded_offsets, **groups
        )
        apart = make_sharded_tensors_for_checkpoint(weights, prefix, dict.fromkeys(weights, 0), (), **groups)
        for name, one in apart.items():
            one.key = f"{prefix}layer_{self.layer_number - 1}.{name.removeprefix(prefix)}"
        return sharded | apart

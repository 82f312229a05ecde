"""The decoder: Megatron-core's GPTModel with the run's kinds of attention in its layers.

Knows layers, positions and the loss per token. Does not know optimizers or batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.utils.checkpoint import checkpoint

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import LOGITS_PER_PIECE, ModelConfig, padded_vocab_size
from dash_dist.config.parallel import ParallelConfig
from dash_dist.context_parallel import DashAttention, WindowAttention
from dash_dist.megatron.conversion import Conversion
from dash_dist.megatron.core_attention import DashCoreAttention
from dash_dist.megatron.fused import fused_summed_loss, fused_token_losses, norm_module
from dash_dist.megatron.layer_config import LayerConfig
from dash_dist.megatron.layers import layer_spec
from dash_dist.megatron.likeliest import likeliest_tokens
from dash_dist.megatron.loss import summed_loss
from dash_dist.megatron.padded_logits import exclude_padding, own_tokens
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.recompute import recompute_settings
from dash_dist.megatron.rotary import ShardRotaryEmbedding
from dash_dist.megatron.sequence_shards import join_pieces, pieces_of_shards, shard_of_marked
from dash_dist.megatron.weights import FullParameters, initialise_weights, read_weights
from dash_dist.models.nsa import nsa_parameters
from dash_kernels.ranges import ranged


class DashGPTModel(GPTModel):
    """One pipeline stage of the decoder.

    Without labels and with a `loss_mask` [b, s], the last stage returns the likeliest next token at the positions that
    it marks, and 0 elsewhere, [b, s] int64.

    With labels, the last stage returns the cross entropy of every token, [b, s] float32; with a `loss_mask` as well,
    the sum where it is True. It never holds the logits of the whole shard: where they would be more than
    `LOGITS_PER_PIECE`, output layer and loss are computed in pieces along the sequence, and again in the backward pass.
    The fused loss computes the gradients of a piece at once instead.

    The output layer has more rows than there are tokens. Their logits are -inf, in the loss and without labels.
    """

    vocab_size_without_padding: int
    """Tokens of the tokenizer; set by `build_model`."""
    fused: bool
    """Take the kernels of `dash_dist.megatron.fused`; set by `build_model`."""
    config: LayerConfig

    def attentions(self) -> Iterator[tuple[int, DashAttention | WindowAttention]]:
        """This stage's, each with its layer, which counts from 0 at the first layer of the model."""
        for layer in self.decoder.layers:
            core_attention = layer.self_attention.core_attention
            assert isinstance(core_attention, DashCoreAttention)
            yield layer.layer_number - 1, core_attention.attention

    def conversions(self) -> Iterator[Conversion]:
        """The local losses of this stage's layers in a conversion phase, and none in another run."""
        for layer in self.decoder.layers:
            if layer.self_attention.core_attention.conversion is not None:
                yield layer.self_attention.core_attention.conversion

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.post_process and labels is None and loss_mask is not None:
            return self._likeliest(hidden_states, loss_mask)
        if not self.post_process or labels is None:
            output = super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
            return self._without_padding(output) if self.post_process else output
        if loss_mask is None:
            return self._token_losses(hidden_states, labels)
        if self._takes_fused_loss(hidden_states):
            rows = self._output_weight()
            if self.vocab_size_without_padding < len(rows):  # a view would copy the gradient of all rows once more
                rows = rows[: self.vocab_size_without_padding]
            return fused_summed_loss(hidden_states, rows, labels, loss_mask)
        return summed_loss(loss_mask, self._token_losses(hidden_states, labels))

    def _takes_fused_loss(self, hidden_states: torch.Tensor) -> bool:
        """Tell whether the output layer is a plain matrix that this rank holds whole, and gradients pass through it."""
        whole = self.tp_group.size() == 1 and type(self.output_layer) is ColumnParallelLinear
        # ZeRO-3 gathers a weight for a module's forward pass only.
        gathered = not hasattr(self._output_weight(), "ds_id")
        return self.fused and whole and gathered and hidden_states.requires_grad

    def _token_losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = self._output_weight()

        @ranged("loss")
        def token_losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits, _ = self.output_layer(hidden, weight=weight)  # [piece, b, vocab / tp]
            if self.fused:
                return fused_token_losses(self._without_padding(logits), targets, self.tp_group)
            return self.compute_language_model_loss(targets, self._without_padding(logits))  # [b, piece]

        tokens, batch, _ = hidden_states.shape
        shards = self.config.sequence_shards  # whose pieces the output layer gathers
        piece = max(1, LOGITS_PER_PIECE // (batch * shards * self.output_layer.output_size_per_partition))
        if piece >= tokens:
            return token_losses(hidden_states, labels)
        losses = [
            # Nothing random happens in a piece, and Megatron's random states are not torch's to save.
            checkpoint(token_losses, hidden, targets, use_reentrant=False, preserve_rng_state=False)
            for hidden, targets in pieces_of_shards(hidden_states, labels, shards, piece)
        ]
        return join_pieces(losses, shards)

    def _likeliest(self, hidden_states: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
        if self.config.sequence_parallel:
            hidden = shard_of_marked(hidden_states, marked, self.tp_group)  # which the output layer gathers
        else:
            hidden = hidden_states.transpose(0, 1)[marked]  # [n, hidden]
        logits, _ = self.output_layer(hidden[:, None], weight=self._output_weight())  # [n or more, 1, vocab / tp]
        likeliest = likeliest_tokens(self._without_padding(logits)[:, 0], self.tp_group)
        found = torch.zeros_like(marked, dtype=torch.int64)
        found[marked] = likeliest[: int(marked.sum())]
        return found

    def _output_weight(self) -> torch.Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        rows = self.output_layer.output_size_per_partition
        return exclude_padding(logits, own_tokens(self.vocab_size_without_padding, rows, self.tp_group.rank()))


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype, device: torch.device
) -> LayerConfig:
    """Megatron-core's configuration of the same model.

    Args:
        dtype: of the weights and activations, float32 or bfloat16.
        device: of the run.
    """

    def leave(_weight: torch.Tensor) -> None:
        """Weights are drawn by `initialise_weights` once the model stands."""

    without_positions: list[int] | None = None
    if model.layers_without_positions:
        without_positions = [int(layer in model.layers_without_positions) for layer in range(model.num_layers)]
    return LayerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.resolved_head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # that is, the specification's
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias,
        # True has Megatron-core sum their gradients over tensor parallelism, which norms over all heads are cut over.
        qk_layernorm=model.qk_norm and not model.qk_norm_over_heads,
        no_rope_freq=without_positions,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave,
        output_layer_init_method=leave,
        use_cpu_initialization=device.type == "cpu",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_shards > 1,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deallocate_pipeline_outputs=True,
        cuda_graph_scope=[],
        mlp_tile_tokens=parallel.mlp_tile_tokens,
        fp8_linears=parallel.fp8_linears,
        **recompute_settings(parallel),
    )


def build_model(
    config: LayerConfig,
    model: ModelConfig,
    attention: AttentionConfig,
    dims: ParallelDims,
    *,
    vocab_size: int,
    sequence_length: int,
    seed: int,
    source: FullParameters | None = None,
    fused: bool = False,
) -> DashGPTModel:
    """This rank's pipeline stage, initialised, on its device.

    Args:
        config: from `transformer_config`.
        vocab_size: tokens of the tokenizer; the embedding has `padded_vocab_size` rows, and so has the output layer.
        sequence_length: tokens of a whole sequence.
        seed: of the initial weights, which depend on nothing else.
        source: of the initial weights; None draws them. Those that only nsa layers have are drawn in any case, but
            that all branches start with the source's keys and values.
        fused: take the kernels of `dash_dist.megatron.fused`, which need a GPU.

    Raises:
        OSError, ValueError: the source cannot give a weight.
    """
    layers = model.num_layers // dims.pp_size
    # The norm after the last layer is named here: Megatron's default is Apex's, where it is installed, which
    # has no RMSNorm.
    layer = layer_spec(model, attention, fused=fused, fp8=config.fp8_linears)
    block = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm_module(fused))
    stage = DashGPTModel(
        config,
        block,
        vocab_size=padded_vocab_size(vocab_size),
        max_sequence_length=sequence_length,
        pre_process=dims.is_first_stage,
        post_process=dims.is_last_stage,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
    )
    stage.vocab_size_without_padding = vocab_size
    stage.fused = fused
    stage.rotary_pos_emb = rotary_embedding(model, attention, dims, sequence_length=sequence_length)
    stage = stage.to(dims.device)
    if source is None:
        initialise_weights(stage, init_std=model.init_std, seed=seed)
    else:
        ours = nsa_parameters(model, attention).keys()
        initialise_weights(stage, init_std=model.init_std, seed=seed, only=ours)
        read_weights(stage, source, without=ours)
        for layer in stage.decoder.layers:
            projection, branches = layer.self_attention.linear_qkv, layer.self_attention.core_attention.branches
            if branches is not None:
                branches.start_from(projection.weight, projection.bias)
    return stage


def rotary_embedding(
    model: ModelConfig, attention: AttentionConfig, dims: ParallelDims, *, sequence_length: int
) -> ShardRotaryEmbedding:
    """This rank's rotary positions in sequences of `sequence_length` tokens."""
    return ShardRotaryEmbedding(
        model.resolved_head_dim,
        rotary_base=model.rotary_base,
        positions=model.positions,
        with_unscaled=model.windows_unscaled,
        sequence_length=sequence_length,
        layout=attention.layout,
        cp_rank=dims.cp_rank,
        cp_size=dims.cp_size,
        device=dims.device,
    )

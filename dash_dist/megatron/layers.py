"""Layers of every family, as specifications of Megatron-core, and the modules that it lacks.

Knows the parts of a layer and its norms; does not know the kinds of attention, nor the model around the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.megatron.core_attention import DashCoreAttention
from dash_dist.megatron.fp8 import Fp8ColumnLinear, Fp8RowLinear, LastFp8Linear
from dash_dist.megatron.fused import SwiGLU, norm_module
from dash_dist.megatron.layer_config import LayerConfig
from dash_dist.megatron.recompute import RecomputableLayer
from dash_dist.megatron.self_attention import RotarySelfAttention
from dash_dist.megatron.unread import LastLinear


def layer_spec(model: ModelConfig, attention: AttentionConfig, *, fused: bool, fp8: bool) -> ModuleSpec:
    """Return the specification of every layer of the model; the kind of attention follows from its number.

    Args:
        fused: take the kernels of `dash_dist.megatron.fused`.
        fp8: take the linears of `dash_dist.megatron.fp8`.
    """
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.module = RecomputableLayer
    norm = norm_module(fused)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    of_mlp = _parts(layer.submodules.mlp)
    of_mlp.activation_func = ModuleSpec(SwiGLU, params={"fused": fused})
    of_attention = layer.submodules.self_attention
    of_attention.submodules.core_attention = functools.partial(DashCoreAttention, attention=attention)
    if model.qk_norm and not model.qk_norm_over_heads:
        of_attention.submodules.q_layernorm = of_attention.submodules.k_layernorm = norm
    if fp8:
        of_attention.submodules.linear_qkv = of_mlp.linear_fc1 = Fp8ColumnLinear
        of_attention.submodules.linear_proj = of_mlp.linear_fc2 = Fp8RowLinear
    if not model.norms_after:  # otherwise a norm reads what these return
        last = LastFp8Linear if fp8 else LastLinear
        of_mlp.linear_fc2 = ModuleSpec(last, params={"part": "mlp"})
        of_attention.submodules.linear_proj = ModuleSpec(last, params={"part": "projections"})
    if model.norms_after:
        layer.module = PostNormLayer
        layer.params = {**layer.params, "norm": norm}
        layer.submodules.input_layernorm = IdentityOp
        layer.submodules.pre_mlp_layernorm = IdentityOp
    if model.qk_norm_over_heads:
        heads = {"q_layernorm": model.num_attention_heads, "k_layernorm": model.num_kv_heads}
        norms = {name: functools.partial(AllHeadsNorm, heads=number) for name, number in heads.items()}
        of_attention.params = {**of_attention.params, "norms": norms}
    of_attention.module = RotarySelfAttention
    if model.windows_unscaled:
        kinds = attention.kinds(model.num_layers)
        unscaled = frozenset(layer for layer, kind in enumerate(kinds) if kind == "window")
        of_attention.params = {**of_attention.params, "unscaled": unscaled}
    return layer


def _parts(module: Any) -> Any:
    """Return the parts of a module that a specification describes; since 0.18, Megatron-core gives a partial call."""
    return module.keywords["submodules"] if isinstance(module, functools.partial) else module.submodules


class PostNormLayer(RecomputableLayer):
    """A layer whose norms follow attention and MLP, before the residual is added, as in OLMo 2.

    Args:
        norm: makes a norm.
    """

    def __init__(self, config: LayerConfig, *args: Any, norm: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_attention_layernorm, self.post_mlp_layernorm = (
            norm(config, config.hidden_size, config.layernorm_epsilon) for _ in range(2)
        )
        self.self_attn_bda = functools.partial(_normed_and_added, self.post_attention_layernorm, self.self_attn_bda)
        self.mlp_bda = functools.partial(_normed_and_added, self.post_mlp_layernorm, self.mlp_bda)


def _normed_and_added(
    norm: torch.nn.Module, added: Callable[..., Callable[..., torch.Tensor]], training: bool, fused: bool
) -> Callable[..., torch.Tensor]:
    """Stand for Megatron-core's `get_bias_dropout_add`, with a norm before it."""

    def add(branch: tuple[torch.Tensor, None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        return added(training, fused)((norm(branch[0]), None), residual, dropout)

    return add


class AllHeadsNorm(MegatronModule):
    """RMSNorm of the queries or keys of all heads together, which tensor-parallel ranks hold parts of.

    Args:
        heads: of the whole model.
        hidden_size: channels of a head.
    """

    def __init__(self, *, heads: int, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__(config=config)
        self.eps = eps
        self.channels = heads * hidden_size
        own = self.channels // config.tensor_model_parallel_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(own, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm of this rank's heads x [b, s, heads / tp, head_dim], over the heads of all ranks. A collective."""
        wide = x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        # Every rank's output depends on every rank's squares: summed forward, and so are their gradients.
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = wide * torch.rsqrt(squares / self.channels + self.eps)
        return (self.weight.view(x.shape[2:]) * normed).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`weight` for Megatron's distributed checkpoint, cut over tensor parallelism."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

"""LoRA adapters beside Megatron-core's fused linears, one for each linear of transformers.

Knows the order of rows in the fused outputs and tensor parallelism. Does not know which parameters train.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from dash_dist.config.model import ModelConfig
from dash_dist.config.trainable import Linear, LoraConfig
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.weights import generator_for, global_name
from dash_dist.models.lora import ROW_PARALLEL, adapter_shapes

_FUSED: dict[str, tuple[Linear, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron-core's linears, and those of transformers that each is made of."""


_BETWEEN: dict[tuple[bool, bool], Callable[..., torch.Tensor]] = {
    (False, False): copy_to_tensor_model_parallel_region,
    (False, True): gather_from_sequence_parallel_region,
    (True, False): reduce_from_tensor_model_parallel_region,
    (True, True): reduce_scatter_to_sequence_parallel_region,
}
"""Communication between A and B, by (the inputs are cut, sequence parallelism)."""


class Adapter(MegatronModule):
    """The product B A of one linear, on one tensor-parallel rank.

    Tensor parallelism cuts B [out / tp, rank] where it cuts the linear's outputs, and A [rank, in / tp] where it cuts
    its inputs. The other matrix is the same at every rank, and so is its gradient: where ranks hold shards of the
    sequence, Megatron-core sums it over them.

    Args:
        sizes: outputs and inputs of the whole linear.
        row_parallel: the inputs are cut.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lora: LoraConfig,
        sizes: tuple[int, int],
        *,
        row_parallel: bool,
        tp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__(config=config)
        outputs, inputs = sizes
        tp = tp_group.size()
        self.row_parallel = row_parallel
        self._between = _BETWEEN[row_parallel, config.sequence_parallel]
        self.tp_group = tp_group
        self.scale = lora.scale
        shape_a = (lora.rank, inputs // tp if row_parallel else inputs)
        shape_b = (outputs if row_parallel else outputs // tp, lora.rank)
        make = functools.partial(torch.zeros, dtype=config.params_dtype, device=device)
        self.a, self.b = nn.Parameter(make(shape_a)), nn.Parameter(make(shape_b))
        cut, whole, dim = (self.a, self.b, 1) if row_parallel else (self.b, self.a, 0)
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=dim, stride=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The adapter's part of the output.

        Args:
            hidden: the linear's input at this rank, [s, b, in], with sequence parallelism [s / tp, b, in]; or if the
                inputs are cut [s, b, in / tp].

        Returns:
            [s, b, out / tp]; or if the inputs are cut [s, b, out], with sequence parallelism [s / tp, b, out].
        """
        inner = self._between(F.linear(hidden, self.a), group=self.tp_group)  # [s, b, rank], or a shard for a whole B
        return F.linear(inner, self.b) * self.scale

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A and B for Megatron's distributed checkpoint."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"a": 1} if self.row_parallel else {"b": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


class Adapters(MegatronModule):
    """The adapters of one attention or MLP, by the linears' names in transformers."""


def add_adapters(stage: GPTModel, model: ModelConfig, lora: LoraConfig, dims: ParallelDims, *, seed: int) -> None:
    """Put adapters beside the linears of every layer of a stage, before it is wrapped.

    A is drawn from U(-1, 1) / sqrt(inputs), as `peft` does, from `seed` and its name; B is zero. Neither depends on
    the layout.
    """
    for layer in stage.decoder.layers:
        for block in (layer.self_attention, layer.mlp):
            adapters = Adapters(config=stage.config)
            for fused, linears in _FUSED.items():
                used = {
                    linear: Adapter(
                        stage.config,
                        lora,
                        adapter_shapes(model, linear),
                        row_parallel=linear in ROW_PARALLEL,
                        tp_group=stage.tp_group,
                        device=dims.device,
                    )
                    for linear in linears
                    if linear in lora.linears and hasattr(block, fused)
                }
                for linear, adapter in used.items():
                    adapters.add_module(linear, adapter)
                if used:
                    join = _join(model, linears, used, dims.tp_size)
                    getattr(block, fused).register_forward_hook(functools.partial(_add, join))
            if list(adapters.children()):
                block.add_module("lora", adapters)
    _draw(stage, dims, seed=seed)


def _add(
    join: Callable[[torch.Tensor], torch.Tensor],
    _linear: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return outputs[0] + join(inputs[0]), outputs[1]


def _join(
    model: ModelConfig, linears: tuple[Linear, ...], used: dict[Linear, Adapter], tp_size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that computes the adapters' part of a fused linear's output, in the order of its rows.

    Megatron-core keeps the query heads, the key head and the value head of each KV head together; SwiGLU's gate is
    above the up projection.
    """
    if len(linears) == 1:
        (adapter,) = used.values()
        return adapter
    groups = model.num_kv_heads // tp_size if linears[0] == "q_proj" else 1
    widths = {linear: adapter_shapes(model, linear)[0] // tp_size // groups for linear in linears}

    def join(hidden: torch.Tensor) -> torch.Tensor:
        own = {linear: adapter(hidden) for linear, adapter in used.items()}
        shape = (*next(iter(own.values())).shape[:-1], groups)
        parts = [
            own[linear].view(*shape, width) if linear in own else hidden.new_zeros(*shape, width)
            for linear, width in widths.items()
        ]
        return torch.cat(parts, dim=-1).flatten(start_dim=-2)

    return join


def _draw(stage: GPTModel, dims: ParallelDims, *, seed: int) -> None:
    for local_name, module in stage.named_modules():
        if isinstance(module, Adapter):
            a = module.a
            rank, inputs = a.shape[0], a.shape[1] * (dims.tp_size if module.row_parallel else 1)
            full = torch.empty(rank, inputs, device=a.device)
            bound = 1 / math.sqrt(inputs)
            full.uniform_(-bound, bound, generator=generator_for(seed, global_name(stage, f"{local_name}.a"), a.device))
            with torch.no_grad():
                a.copy_(full.chunk(dims.tp_size, 1)[dims.tp_rank] if module.row_parallel else full)

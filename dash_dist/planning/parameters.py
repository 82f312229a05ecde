"""The weights of one rank: which tensors, how many numbers, and Megatron-core's buffers around them.

Knows `dash_dist.megatron.model`'s parameters and how `_ParamAndGradBuffer` lays them out (megatron-core 0.16 to 0.19,
`distributed/param_and_grad_buffer.py` and `optimizer/param_layout.py`). Does not know bytes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from dash_dist.config.trainable import ADAPTERS, Linear, LoraConfig, TrainableSection
from dash_dist.models.nsa import nsa_shapes
from dash_dist.planning.layouts import Sizes


@dataclass(frozen=True)
class Weight:
    """One parameter. own_bucket: the buffer keeps it apart, since two pipeline stages hold it."""

    name: str
    numbers: int
    own_bucket: bool = False


@dataclass(frozen=True)
class StageNumbers:
    """Numbers of one rank, the padding of buffers included.

    Attributes:
        weights: in memory, frozen ones included.
        trained: in the buffer of gradients.
    """

    weights: int
    trained: int


def layer_weights(sizes: Sizes, layer: int, lora: LoraConfig | None = None) -> list[Weight]:
    """Return the weights of one decoder layer, in the order in which Megatron-core registers them."""
    weights = {
        "input_layernorm.weight": sizes.hidden,
        "self_attention.core_attention.attention.summary_query": sizes.kv_heads * sizes.head_dim,
        **(_of_nsa(sizes) if layer in sizes.nsa_layers else {}),
        "self_attention.linear_proj.weight": sizes.q * sizes.hidden,
        "self_attention.linear_qkv.weight": (sizes.q + 2 * sizes.kv) * sizes.hidden,
        **_adapters(sizes, lora, "self_attention"),
        "pre_mlp_layernorm.weight": sizes.hidden,
        "mlp.linear_fc1.weight": 2 * sizes.ffn * sizes.hidden,
        "mlp.linear_fc2.weight": sizes.ffn * sizes.hidden,
        **_adapters(sizes, lora, "mlp"),
    }
    return [Weight(f"decoder.layers.{layer}.{name}", numbers) for name, numbers in weights.items()]


def _of_nsa(sizes: Sizes) -> dict[str, int]:
    """Weights of an nsa layer alone; its biases do not count, like those of other projections."""
    shapes = nsa_shapes(
        hidden=sizes.hidden,
        query_heads=sizes.query_heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        bias=False,
    )
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _adapters(sizes: Sizes, lora: LoraConfig | None, block: str) -> dict[str, int]:
    linears: dict[str, dict[Linear, tuple[int, int]]] = {  # outputs and inputs at this rank
        "self_attention": {
            "q_proj": (sizes.q, sizes.hidden),
            "k_proj": (sizes.kv, sizes.hidden),
            "v_proj": (sizes.kv, sizes.hidden),
            "o_proj": (sizes.hidden, sizes.q),
        },
        "mlp": {
            "gate_proj": (sizes.ffn, sizes.hidden),
            "up_proj": (sizes.ffn, sizes.hidden),
            "down_proj": (sizes.hidden, sizes.ffn),
        },
    }
    numbers = {}
    for linear, (outputs, inputs) in linears[block].items():
        if lora is not None and linear in lora.linears:
            numbers[f"{block}{ADAPTERS}{linear}.a"] = lora.rank * inputs
            numbers[f"{block}{ADAPTERS}{linear}.b"] = lora.rank * outputs
    return numbers


def stage_weights(
    sizes: Sizes, *, pipeline: int, stage: int, tie_embeddings: bool, lora: LoraConfig | None = None
) -> list[Weight]:
    """Return the weights of pipeline stage `stage` (from 0) of `pipeline`."""
    first, last = stage == 0, stage == pipeline - 1
    rows, shared = sizes.vocab * sizes.hidden, tie_embeddings and pipeline > 1
    embedding = Weight("embedding.word_embeddings.weight", rows, own_bucket=shared)
    weights = [embedding] if first else []
    for layer in range(sizes.layers):
        weights += layer_weights(sizes, stage * sizes.layers + layer, lora)
    if last:
        weights.append(Weight("decoder.final_layernorm.weight", sizes.hidden))
        if not tie_embeddings:
            weights.append(Weight("output_layer.weight", rows))
        elif not first:
            weights.append(embedding)
    return weights


@functools.lru_cache(maxsize=1024)
def stage_numbers(
    sizes: Sizes,
    *,
    pipeline: int,
    stage: int,
    replicas: int,
    tie_embeddings: bool,
    distributed_optimizer: bool,
    trainable: TrainableSection,
) -> StageNumbers:
    """Return the numbers of a stage; frozen weights are not in the buffers."""
    weights = stage_weights(sizes, pipeline=pipeline, stage=stage, tie_embeddings=tie_embeddings, lora=trainable.lora)
    trained = [weight for weight in weights if trainable.trains(weight.name)]
    frozen = sum(weight.numbers for weight in weights) - sum(weight.numbers for weight in trained)
    numbers = buffer_numbers(trained, replicas, distributed_optimizer=distributed_optimizer)
    return StageNumbers(weights=frozen + numbers, trained=numbers)


def buffer_numbers(weights: list[Weight], replicas: int, *, distributed_optimizer: bool) -> int:
    """Numbers in the buffer of all weights, or of all gradients, of a rank, padding included.

    With the distributed optimizer, weights begin at multiples of 64 and buckets end at multiples of the ranks they
    are sharded over (and of 128).
    """
    if not distributed_optimizer:
        return sum(weight.numbers for weight in weights)
    unit = math.lcm(replicas, 128)
    at, bucket_start = 0, 0
    for weight in reversed(weights):
        at = _next_multiple(at, 64)
        if weight.own_bucket and at > bucket_start:
            at = bucket_start = _next_multiple(at, unit)
        at += weight.numbers
        if weight.own_bucket:
            at = bucket_start = _next_multiple(at, unit)
    return _next_multiple(at, unit)


def _next_multiple(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""The weights of one rank: which tensors, how many numbers, and Megatron-core's buffers around them.

Knows `dash_dist.megatron.model`'s parameters and how `_ParamAndGradBuffer` (megatron-core 0.16,
`distributed/param_and_grad_buffer.py`) lays them out. Does not know bytes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from dash_dist.planning.layouts import Sizes


@dataclass(frozen=True)
class Weight:
    """One parameter. own_bucket: the buffer keeps it apart, since two pipeline stages hold it."""

    numbers: int
    own_bucket: bool = False


def layer_weights(sizes: Sizes) -> list[Weight]:
    """Return the weights of one decoder layer, in the order in which Megatron-core registers them."""
    return [
        Weight(sizes.hidden),  # norm before the attention
        Weight(sizes.kv_heads * sizes.head_dim),  # summary_query
        Weight(sizes.q * sizes.hidden),  # projection out of the attention
        Weight((sizes.q + 2 * sizes.kv) * sizes.hidden),  # projection into it
        Weight(sizes.hidden),  # norm before the MLP
        Weight(2 * sizes.ffn * sizes.hidden),
        Weight(sizes.ffn * sizes.hidden),
    ]


def stage_weights(sizes: Sizes, *, pipeline: int, stage: int, tie_embeddings: bool) -> list[Weight]:
    """Return the weights of pipeline stage `stage` (from 0) of `pipeline`."""
    first, last = stage == 0, stage == pipeline - 1
    embedding = Weight(sizes.vocab * sizes.hidden, own_bucket=tie_embeddings and pipeline > 1)
    weights = [embedding] if first else []
    weights += layer_weights(sizes) * sizes.layers
    if last:
        weights.append(Weight(sizes.hidden))  # norm after the last layer
        if not (tie_embeddings and first):
            weights.append(embedding)
    return weights


@functools.lru_cache(maxsize=1024)
def stage_numbers(
    sizes: Sizes, *, pipeline: int, stage: int, replicas: int, tie_embeddings: bool, distributed_optimizer: bool
) -> int:
    """`buffer_numbers` of a stage."""
    weights = stage_weights(sizes, pipeline=pipeline, stage=stage, tie_embeddings=tie_embeddings)
    return buffer_numbers(weights, replicas, distributed_optimizer=distributed_optimizer)


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

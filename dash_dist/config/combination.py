"""Combinations of sections that cannot work on any machine.

Knows which values fit together; does not know the GPUs that are present.
"""

from __future__ import annotations

from dash_dist.config.attention import PIECES_PER_RANK, AttentionConfig
from dash_dist.config.model import VOCAB_MULTIPLE, ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.section import divisors, next_multiple
from dash_kernels.limits import FP8_MULTIPLE, MAX_TRITON_HEAD_DIM


def check_combination(
    model: ModelConfig,
    attention: AttentionConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    sequence_length: int,
) -> None:
    """Refuse combinations that no single section can check.

    Args:
        world_size: processes of the run.
        sequence_length: tokens of one sequence, before it is split.

    Raises:
        ValueError: the message gives the value and the change to make.
    """
    parallel.data_parallel_size(world_size)
    attention.kinds(model.num_layers)
    _check_positions(model, sequence_length)
    if attention.backend == "triton" and attention.alpha != 1.5:
        raise ValueError(
            f"attention.backend=triton computes attention.alpha 1.5 only, not {attention.alpha}: "
            "set attention.backend to auto or eager, or attention.alpha to 1.5"
        )
    if attention.backend == "triton" and model.resolved_head_dim > MAX_TRITON_HEAD_DIM:
        raise ValueError(
            f"attention.backend=triton takes a head_dim of up to {MAX_TRITON_HEAD_DIM}, not "
            f"{model.resolved_head_dim}: set attention.backend to auto or eager, or lower model.head_dim"
        )
    if model.num_kv_heads % parallel.tensor:
        raise ValueError(
            f"num_kv_heads {model.num_kv_heads} is not a multiple of parallel.tensor {parallel.tensor}: set "
            f"parallel.tensor to one of {divisors(model.num_kv_heads)}"
        )
    if model.ffn_hidden_size % parallel.tensor:
        raise ValueError(
            f"ffn_hidden_size {model.ffn_hidden_size} is not a multiple of parallel.tensor "
            f"{parallel.tensor}: set it to {next_multiple(model.ffn_hidden_size, parallel.tensor)}"
        )
    if VOCAB_MULTIPLE % parallel.tensor:
        raise ValueError(
            f"parallel.tensor {parallel.tensor} does not divide {VOCAB_MULTIPLE}, the multiple the "
            f"vocabulary is padded to: set parallel.tensor to one of {divisors(VOCAB_MULTIPLE)}"
        )
    if model.num_layers % parallel.pipeline:
        raise ValueError(
            f"num_layers {model.num_layers} is not a multiple of parallel.pipeline {parallel.pipeline}: set "
            f"parallel.pipeline to one of {divisors(model.num_layers)}"
        )
    layers = model.num_layers // parallel.pipeline
    if parallel.recompute_layers is not None and parallel.recompute_layers > layers:
        raise ValueError(
            f"parallel.recompute_layers {parallel.recompute_layers} is more than the {layers} layers of a pipeline "
            f"stage: set it to {layers} or less, or to null for all of them"
        )
    if attention.ranks_per_node is not None and parallel.context % attention.ranks_per_node:
        raise ValueError(
            f"attention.ranks_per_node {attention.ranks_per_node} does not divide parallel.context {parallel.context}: "
            f"set it to one of {divisors(parallel.context)}, or to null to have the nodes found by host name"
        )
    if attention.conversion is not None and parallel.overlap_gradients:
        raise ValueError(
            "parallel.overlap_gradients waits for gradients of the backward pass, and attention.conversion computes "
            "them in the forward pass: set parallel.overlap_gradients to false"
        )
    if attention.conversion is not None and parallel.offload_activations:
        raise ValueError(
            "parallel.offload_activations moves inputs that wait for a backward pass, and attention.conversion has "
            "none: set parallel.offload_activations to 0"
        )
    if parallel.fp8_linears:
        _check_fp8(model, parallel)
    _check_shards(parallel, sequence_length)
    pieces_per_rank = PIECES_PER_RANK[attention.layout]
    pieces = parallel.context * pieces_per_rank
    if parallel.context > 1 and sequence_length % (pieces * attention.chunk_size):
        factors = f"{f'{pieces_per_rank} x ' if pieces_per_rank > 1 else ''}cp x chunk_size"
        multiple = pieces * attention.chunk_size
        raise ValueError(
            f"sequence length {sequence_length} is not a multiple of {factors} = {multiple}: pad to "
            f"{next_multiple(sequence_length, multiple)}"
        )


def _check_shards(parallel: ParallelConfig, sequence_length: int) -> None:
    multiple = parallel.context * parallel.tensor
    if parallel.sequence_shards > 1 and sequence_length % multiple:
        raise ValueError(
            f"sequence length {sequence_length} is not a multiple of cp x tp = {parallel.context} x {parallel.tensor} "
            f"= {multiple}, over which parallel.sequence_parallel splits it: pad to "
            f"{next_multiple(sequence_length, multiple)}, or set parallel.sequence_parallel to false"
        )


def _check_fp8(model: ModelConfig, parallel: ParallelConfig) -> None:
    heads, kv_heads, tensor = model.num_attention_heads, model.num_kv_heads, parallel.tensor
    widths = {
        "hidden_size": model.hidden_size,
        f"ffn_hidden_size / parallel.tensor {tensor}": model.ffn_hidden_size // tensor,
        f"num_attention_heads x head_dim / parallel.tensor {tensor}": heads * model.resolved_head_dim // tensor,
        f"(num_attention_heads + 2 x num_kv_heads) x head_dim / parallel.tensor {tensor}": (heads + 2 * kv_heads)
        * model.resolved_head_dim
        // tensor,
    }
    for name, width in widths.items():
        if width % FP8_MULTIPLE:
            raise ValueError(
                f"{name} = {width} is not a multiple of {FP8_MULTIPLE}, which parallel.fp8_linears needs: change it, "
                "or set parallel.fp8_linears to false"
            )


def _check_positions(model: ModelConfig, sequence_length: int) -> None:
    limit = model.positions.limit
    if limit is None or sequence_length <= limit:
        return
    name = "length" if model.positions.type == "dynamic" else "max_positions"
    raise ValueError(
        f"sequence length {sequence_length} is beyond model.positions.{name} {limit}: set it to {sequence_length}, and "
        "scale the positions to that length (raise model.rotary_base, or change model.positions.type and factor), or "
        "train on shorter sequences"
    )

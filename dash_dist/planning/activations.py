"""Bytes of one layer, counted tensor by tensor: tensors that autograd saves, and temporary ones of a pass.

Knows the modules of `dash_dist.megatron.model` on a GPU (bfloat16, fused norms, rotary embedding and SwiGLU, the Triton
attention). Does not know layers' number, pipelines nor weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dash_dist.config.attention import Kind
from dash_dist.config.selection import FIXED_KINDS
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.traffic import BF16, FP32, ExchangePlan
from dash_kernels.limits import MAX_SLAB_BYTES
from dash_kernels.selection import STRIDE

INT32, INT64 = 4, 8


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that autograd saves of a layer, by the part that makes them.

    Attributes:
        input: the residual stream before it.
        projections: its norm, queries, keys and values, and the attention's output as the next projection takes it.
        attention: its output, log-sum-exp, routing and summaries, and the addresses of its exchange.
        middle: the residual stream between attention and MLP.
        mlp: its norm and itself.
    """

    input: int
    projections: int
    attention: int
    middle: int
    mlp: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def kept_by_layer(
    sizes: Sizes, kind: Kind, exchange: ExchangePlan, recompute: Recompute, *, tiled: bool = False
) -> int:
    """Bytes from a layer's forward pass to its backward pass, or to its recomputation."""
    saved = saved_by_layer(sizes, kind, exchange, tiled=tiled)
    if recompute.attention:  # the first pass leaves its routing and its plan to the second
        return saved.input + saved_by_routing(sizes, kind) + saved_by_exchange(sizes, exchange)
    if recompute.whole:
        return saved.input + saved.attention
    return saved.total - saved.projections * recompute.projections - saved.mlp * recompute.mlp


def saved_by_layer(sizes: Sizes, kind: Kind, exchange: ExchangePlan, *, tiled: bool = False) -> LayerBytes:
    """Count what autograd saves of a layer's forward pass with gradients; of a tiled MLP nothing but its input."""
    hidden, q, kv = sizes.hidden, sizes.q, sizes.kv
    # [b, s] to [s, b] for the projection after the attention; the sum of NSA's branches is not kept beside it.
    copy = q if sizes.batch > 1 and kind != "nsa" else 0
    normed = sizes.stream_tokens * hidden * BF16  # the input of a projection, which gathers it again
    norm = sizes.stream_tokens * FP32  # reciprocal root mean squares
    # Queries and keys after the rotary embedding, and values.
    projections = normed + sizes.tokens * (q + 2 * kv + copy) * BF16 + norm
    attention = sizes.tokens * q * BF16 + sizes.tokens * sizes.query_heads * FP32  # output and log-sum-exp
    if kind == "window":
        projections += _saved_with_halo(sizes, exchange)
    else:
        # Of the whole sequence.
        summaries = sizes.batch * sizes.chunks * summary_vectors(sizes, kind) * sizes.kv * FP32
        attention += summaries + saved_by_exchange(sizes, exchange) + saved_by_routing(sizes, kind)
    if kind == "nsa":
        in_projections, in_attention = _saved_by_branches(sizes)
        projections, attention = projections + in_projections, attention + in_attention
    # After its norm, and of SwiGLU both halves of the input, and their product.
    mlp = 0 if tiled else normed + sizes.tokens * 3 * sizes.ffn * BF16 + norm
    residual = input_of_layer(sizes)
    return LayerBytes(residual, projections, attention, residual, mlp)


def _saved_with_halo(sizes: Sizes, exchange: ExchangePlan) -> int:
    """K and V of the shard and its halo, put together."""
    if exchange.name == "none":
        return 0
    return round(2 * (sizes.tokens * sizes.kv + exchange.received * sizes.chunk_size * sizes.head_dim) * BF16)


def _saved_by_branches(sizes: Sizes) -> tuple[int, int]:
    """Keys, values and gates of NSA's other branches; and their outputs, with what their backward passes need."""
    tokens, kv, strides = sizes.tokens, sizes.kv, sizes.shard // STRIDE
    gates = 3 * sizes.query_heads * (2 if sizes.batch > 1 else 1)  # and in [b, s]
    projections = tokens * (2 * kv + gates) * BF16  # of the compressed branch, the tokens by stride are kept
    outputs = 3 * tokens * sizes.q * BF16 + 2 * tokens * sizes.query_heads * FP32  # two branches', and the gated sum
    by_stride = 2 * tokens * kv * BF16 + 2 * sizes.shard * INT64 + strides * sizes.head_dim * FP32  # with their angles
    hidden = 2 * sizes.batch * strides * kv * BF16
    gathered = 2 * sizes.batch * sizes.chunks * summary_vectors(sizes, "nsa") * kv * BF16
    return projections, outputs + by_stride + hidden + gathered


def saved_by_routing(sizes: Sizes, kind: Kind) -> int:
    """Thresholds and mean of the prior, or a list of chunks; number of selected chunks per token; the bits of tiles."""
    if kind == "window":
        return 0
    if kind in FIXED_KINDS:
        entries = 1 + min(sizes.listed, sizes.chunks)
        return sizes.tokens * sizes.kv_heads * entries * INT32 + tile_bits(sizes)
    per_token = sizes.query_heads * FP32 + 2 * sizes.kv_heads * FP32
    return sizes.tokens * per_token + tile_bits(sizes)


def tile_bits(sizes: Sizes) -> int:
    """A bit per tile and chunk of the whole sequence, in words of 32, as the Triton backend keeps them."""
    tiles = sizes.tokens // sizes.tile_tokens
    return tiles * sizes.kv_heads * -(-sizes.chunks // 32) * 4


def summary_vectors(sizes: Sizes, kind: Kind) -> int:
    """Vectors of a chunk by which it is selected.

    NSA's are rounded to 16 bits, and travel with as many values: together the bytes of that many float32 vectors.
    """
    return sizes.chunk_size // STRIDE if kind in ("infllmv2", "nsa") else 1


def saved_by_exchange(sizes: Sizes, exchange: ExchangePlan) -> int:
    """Addresses of the blocks of a plan: one number of each block received, three of each sent."""
    return round(exchange.received * 4 * INT64) if exchange.name == "selective" else 0


def received_by_exchange(sizes: Sizes, exchange: ExchangePlan) -> int:
    """K and V of other ranks that a pass holds until its end; the ring passes them on."""
    if exchange.name not in ("selective", "allgather"):
        return 0
    return round(exchange.received * 2 * sizes.chunk_size * sizes.head_dim * BF16)


def input_of_layer(sizes: Sizes) -> int:
    """One number per token and channel of the residual stream."""
    return sizes.stream_tokens * sizes.hidden * BF16


def gathered_stream(sizes: Sizes) -> int:
    """Bytes of a residual stream, or of its gradient, that is gathered from shards of the sequence; 0 without them."""
    return sizes.tokens * sizes.hidden * BF16 if sizes.sequence_shards > 1 else 0


@dataclass(frozen=True)
class Moment:
    """Temporary bytes at the fullest moment of a part of the backward pass. freed: part of the saved bytes.

    attention: work space of the kernels. exchange: K, V and gradients of other ranks.
    """

    name: str
    activations: int = 0
    attention: int = 0
    exchange: int = 0
    freed: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.attention + self.exchange - self.freed


def mlp_moment(sizes: Sizes, casts: int = 0) -> Moment:
    """Gradients of SwiGLU: of the product and of both factors, where the product itself is freed; or of the product and
    of the second matrix, with the gathered gradient of its output. casts: bytes of `last_casts`, held before the
    gradient of the matrix is computed."""
    half = sizes.tokens * sizes.ffn * BF16
    gradients = max(2 * half, half + max(sizes.ffn * sizes.hidden * BF16, casts) + gathered_stream(sizes))
    return Moment("backward of an MLP", activations=input_of_layer(sizes) + gradients)


def attention_moment(sizes: Sizes, kind: Kind, exchange: ExchangePlan) -> Moment:
    """Gradients of the keys, once the layer's MLP is done with."""
    if kind == "window":
        return _window_moment(sizes, exchange)
    tokens, q, kv = sizes.tokens, sizes.q, sizes.kv
    outputs = 3 if kind == "nsa" else 1
    # Of the output, or of each branch's, of the queries, and of the residual stream.
    gradients = tokens * BF16 * (outputs + 1) * q + input_of_layer(sizes)
    own = 2 * tokens * kv * FP32
    scratch = min(sizes.batch * sizes.kv_heads * sizes.chunks * sizes.shard // 8, MAX_SLAB_BYTES)
    copies = tokens * q * BF16 if sizes.batch > 1 else 0  # the output's gradient, made contiguous
    # At the end the scratch is gone and the gradients are rounded to bfloat16.
    work = own + max(scratch + copies, 2 * tokens * kv * BF16)
    travelling = 0
    in_parts = sizes.attend_first_chunk and kind == "dash"
    if in_parts:
        work += _lists_of_first_chunks(sizes)
    if in_parts or exchange.name != "none":
        work += tokens * q * FP32  # the first parts' gradient of the queries
    if exchange.name != "none":
        block = 2 * sizes.chunk_size * sizes.head_dim
        # As received, their gradients, and those that others send home; the ring has the next part on its way, too.
        held = {"selective": BF16 + 2 * FP32, "allgather": BF16 + FP32 + FP32 / exchange_ranks(sizes)}
        ring = 2 * BF16 + 2 * FP32
        travelling = round(exchange.received * block * held.get(exchange.name, ring))
    freed = tokens * BF16 * 3 * sizes.ffn + 2 * input_of_layer(sizes)
    return Moment("backward of an attention", gradients, work, travelling, freed)


def _lists_of_first_chunks(sizes: Sizes) -> int:
    """A list of one chunk for each token, and the bits of tiles, which have three numbers for each document."""
    documents = math.ceil(sizes.chunks * sizes.chunk_size / sizes.document)
    words = -(-3 * documents // 32)
    return sizes.kv_heads * (sizes.tokens + sizes.tokens // sizes.tile_tokens * words) * INT32


def _window_moment(sizes: Sizes, exchange: ExchangePlan) -> Moment:
    """Gradients of a layer with windows: float32 sums of the queries', and of K and V for each query head."""
    gradients = sizes.tokens * BF16 * 2 * sizes.q + input_of_layer(sizes)
    band = sizes.tokens * sizes.kv + exchange.received * sizes.chunk_size * sizes.head_dim
    of_heads = band * (sizes.group if sizes.group > 1 else 0)
    travelling = 0.0 if exchange.name == "none" else 2 * band * (BF16 + FP32)
    work = round(sizes.tokens * sizes.q * FP32 + 2 * (of_heads + band) * BF16)
    freed = sizes.tokens * BF16 * 3 * sizes.ffn + 2 * input_of_layer(sizes)
    return Moment("backward of an attention with a window", gradients, work, round(travelling), freed)


def exchange_ranks(sizes: Sizes) -> float:
    """Context-parallel ranks."""
    return sizes.chunks * sizes.chunk_size / sizes.shard

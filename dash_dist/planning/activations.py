"""Bytes of one layer, counted tensor by tensor: tensors that autograd saves, and temporary ones of a pass.

Knows the modules of `dash_dist.megatron.model` on a GPU (bfloat16, PyTorch's fused RMSNorm, Megatron-core's unfused
rotary embedding and SwiGLU, the Triton attention). Does not know layers' number, pipelines nor weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from dash_dist.config.attention import Kind
from dash_dist.config.model import LOGITS_PER_PIECE
from dash_dist.config.selection import FIXED_KINDS
from dash_dist.planning.layouts import Sizes
from dash_dist.planning.traffic import BF16, FP32, ExchangePlan
from dash_kernels.limits import MAX_SLAB_BYTES
from dash_kernels.selection import STRIDE

INT32, INT64 = 4, 8


def saved_by_layer(sizes: Sizes, kind: Kind, exchange: ExchangePlan) -> int:
    """Kept from a layer's forward pass to its backward pass, without recomputation."""
    hidden, q, kv, ffn = sizes.hidden, sizes.q, sizes.kv, sizes.ffn
    copy = q if sizes.batch > 1 else 0  # [b, s] to [s, b] for the projection after the attention
    numbers = (
        2 * hidden  # the layer's input, and after its norm
        + (q + 2 * kv)  # queries, keys and values in one tensor: the values are a view of it
        + (q + kv)  # queries and keys after the rotary embedding
        + q  # output of the attention
        + copy
        + 2 * hidden  # input of the MLP's norm, and after it
        + 5 * ffn  # both halves of SwiGLU's input, silu of one, the other once more, their product
    )
    norms = 2 * FP32  # reciprocal root mean squares
    angles = 4 * sizes.shard * sizes.head_dim * BF16  # cosines and sines, for queries and for keys
    of_layer = sizes.tokens * (numbers * BF16 + norms) + angles
    if kind == "window":
        return of_layer + sizes.tokens * sizes.query_heads * FP32 + _saved_with_halo(sizes, exchange)
    of_layer += saved_by_exchange(sizes, exchange)
    return of_layer + saved_by_routing(sizes, kind) + _saved_by_attention(sizes, kind)


def _saved_with_halo(sizes: Sizes, exchange: ExchangePlan) -> int:
    """K and V of the shard and its halo, put together."""
    if exchange.name == "none":
        return 0
    return round(2 * (sizes.tokens * sizes.kv + exchange.received * sizes.chunk_size * sizes.head_dim) * BF16)


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


def _saved_by_attention(sizes: Sizes, kind: Kind) -> int:
    log_sums = sizes.tokens * sizes.query_heads * FP32
    summaries = sizes.batch * sizes.chunks * summary_vectors(sizes, kind) * sizes.kv * FP32  # of the whole sequence
    return log_sums + summaries


def summary_vectors(sizes: Sizes, kind: Kind) -> int:
    """Vectors of a chunk by which it is selected."""
    return sizes.chunk_size // STRIDE if kind == "infllmv2" else 1


def saved_by_exchange(sizes: Sizes, exchange: ExchangePlan) -> int:
    """Addresses of the blocks of a plan: one number of each block received, three of each sent."""
    return round(exchange.received * 4 * INT64) if exchange.name == "selective" else 0


def input_of_layer(sizes: Sizes) -> int:
    """One number per token and channel of the residual stream: what full recomputation keeps of a layer."""
    return sizes.tokens * sizes.hidden * BF16


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


def mlp_moment(sizes: Sizes) -> Moment:
    """Gradients of SwiGLU: of the product and of both factors, where the product itself is freed; or of the product and
    of the second matrix."""
    half = sizes.tokens * sizes.ffn * BF16
    gradients = max(2 * half, half + sizes.ffn * sizes.hidden * BF16)
    return Moment("backward of an MLP", activations=input_of_layer(sizes) + gradients)


def attention_moment(sizes: Sizes, kind: Kind, exchange: ExchangePlan) -> Moment:
    """Gradients of the keys, once the layer's MLP is done with."""
    if kind == "window":
        return _window_moment(sizes, exchange)
    tokens, q, kv = sizes.tokens, sizes.q, sizes.kv
    gradients = tokens * BF16 * (2 * q + sizes.hidden)  # of the output, the queries, and the residual stream
    own = 2 * tokens * kv * FP32
    scratch = min(sizes.batch * sizes.kv_heads * sizes.chunks * sizes.shard // 8, MAX_SLAB_BYTES)
    values = tokens * kv * BF16 if sizes.batch == 1 else tokens * BF16 * (2 * q + 2 * kv)  # made contiguous
    # At the end the scratch is gone and the gradients are rounded to bfloat16.
    work = own + max(scratch + values, 2 * tokens * kv * BF16)
    travelling = 0
    if exchange.name != "none":
        work += tokens * q * FP32  # the first parts' gradient of the queries
        block = 2 * sizes.chunk_size * sizes.head_dim
        # As received, their gradients, and those that others send home; the ring has the next part on its way, too.
        copies = {"selective": BF16 + 2 * FP32, "allgather": BF16 + FP32 + FP32 / exchange_ranks(sizes)}
        ring = 2 * BF16 + 2 * FP32
        travelling = round(exchange.received * block * copies.get(exchange.name, ring))
    freed = tokens * BF16 * (5 * sizes.ffn + 2 * sizes.hidden)
    return Moment("backward of an attention", gradients, work, travelling, freed)


def _window_moment(sizes: Sizes, exchange: ExchangePlan) -> Moment:
    """Gradients of a layer with windows: float32 sums of the queries', and of K and V for each query head."""
    gradients = sizes.tokens * BF16 * (2 * sizes.q + sizes.hidden)
    band = sizes.tokens * sizes.kv + exchange.received * sizes.chunk_size * sizes.head_dim
    of_heads = band * (sizes.group if sizes.group > 1 else 0)
    travelling = 0.0 if exchange.name == "none" else 2 * band * (BF16 + FP32)
    work = round(sizes.tokens * sizes.q * FP32 + 2 * (of_heads + band) * BF16)
    freed = sizes.tokens * BF16 * (5 * sizes.ffn + 2 * sizes.hidden)
    return Moment("backward of an attention with a window", gradients, work, round(travelling), freed)


def exchange_ranks(sizes: Sizes) -> float:
    """Context-parallel ranks."""
    return sizes.chunks * sizes.chunk_size / sizes.shard


def saved_by_loss(sizes: Sizes) -> int:
    """The last norm's input and output, and the probabilities, unless the loss is computed in pieces."""
    kept = 2 * sizes.tokens * sizes.hidden * BF16 + sizes.tokens * (FP32 + INT64 + 1)
    if loss_in_pieces(sizes):
        return kept
    return kept + sizes.tokens * sizes.vocab * FP32


def loss_in_pieces(sizes: Sizes) -> bool:
    """The logits of a shard are more than `LOGITS_PER_PIECE`."""
    return sizes.tokens * sizes.vocab > LOGITS_PER_PIECE


def loss_moment(sizes: Sizes) -> Moment:
    """Logits in bfloat16 and float32, or the latter and their gradient; gradients of the output layer's weight, one
    of them the sum of the pieces', and of its input."""
    logits = min(sizes.tokens * sizes.vocab, LOGITS_PER_PIECE) * (BF16 + (FP32 if loss_in_pieces(sizes) else 0))
    weight = (2 if loss_in_pieces(sizes) else 1) * sizes.vocab * sizes.hidden * BF16
    return Moment("loss", activations=logits + weight + sizes.tokens * sizes.hidden * BF16)

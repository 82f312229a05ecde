"""Bytes and seconds of output layer and loss.

Knows `dash_dist.megatron.fused` and the pieces of `DashGPTModel`; does not know the layers before them.
"""

from __future__ import annotations

from dash_dist.config.model import LOGITS_PER_PIECE
from dash_dist.planning.activations import INT64, Moment, gathered_stream, input_of_layer
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.step import Pace, StepTime
from dash_dist.planning.traffic import BF16, FP32

# Bytes per logit that element-wise kernels read and write. Fused: written, read for the sum, read and overwritten by
# the gradient, read by two products. In parts of the vocabulary: the largest, the sum and the exponentials, and
# backward their gradient, rounded.
_FUSED_LOGITS = 12
_LOGITS = (8, 14)


def is_fused(layout: Layout) -> bool:
    """A rank holds the whole output layer, and computes the gradients of a piece at once."""
    return layout.tensor == 1


def in_pieces(sizes: Sizes) -> bool:
    """The logits of a shard are more than `LOGITS_PER_PIECE`."""
    return sizes.tokens * sizes.vocab > LOGITS_PER_PIECE


def output_passes(sizes: Sizes, *, fused: bool) -> int:
    """Products of the output layer, forward and backward."""
    return 3 if fused or not in_pieces(sizes) else 4


def saved_by_loss(sizes: Sizes, *, fused: bool) -> int:
    """Bytes to the backward pass: the last norm's input; fused, the gradients of its output and of the output layer,
    and otherwise its output, and the probabilities unless the loss is computed in pieces."""
    kept = 2 * input_of_layer(sizes) + sizes.stream_tokens * FP32 + sizes.tokens * (INT64 + 1)
    if fused:
        return kept + sizes.vocab * sizes.hidden * BF16
    return kept if in_pieces(sizes) else kept + sizes.tokens * sizes.vocab * FP32


def loss_moment(sizes: Sizes, *, fused: bool) -> Moment:
    """Fused: a piece's logits, the sum of the weight's gradients in float32, and the last norm's output. Otherwise
    logits in bfloat16, their exponentials and gradient; gradients of the weight, of one piece and of all, and of its
    input, which shards of the sequence have gathered before it is summed."""
    stream = input_of_layer(sizes)
    weight = sizes.vocab * sizes.hidden
    if fused:
        return Moment("loss", activations=_fused_rows(sizes) * sizes.vocab * BF16 + weight * FP32 + stream)
    numbers = min(sizes.tokens * sizes.vocab, LOGITS_PER_PIECE)
    logits = numbers * (BF16 + (FP32 if in_pieces(sizes) else 0))
    gathered = round(gathered_stream(sizes) * numbers / (sizes.tokens * sizes.vocab))
    return Moment("loss", activations=logits + gathered + (2 if in_pieces(sizes) else 1) * weight * BF16 + stream)


def _fused_rows(sizes: Sizes) -> int:
    """Tokens of a piece of Liger's fused loss: as many as make its logits about as large as its input, rounded up to a
    power of two."""
    pieces = -(-sizes.vocab // sizes.hidden)
    rows = -(-sizes.tokens // pieces)
    return min(1 << (rows - 1).bit_length(), sizes.tokens)


def loss_time(sizes: Sizes, pace: Pace, *, fused: bool) -> StepTime:
    """Output layer and loss, forward and backward, of one micro-batch."""
    logits = sizes.tokens * sizes.vocab
    passes = output_passes(sizes, fused=fused)
    size = _FUSED_LOGITS if fused else _LOGITS[0] * (passes - 2) + _LOGITS[1]
    return StepTime(
        matmul=pace.products(2.0 * logits * sizes.hidden) * passes, elementwise=pace.elementwise(logits * size)
    )

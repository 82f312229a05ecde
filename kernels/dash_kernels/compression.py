"""Compression of NSA (arXiv 2502.11089): one learned key, and one learned value, for every 32 tokens.

Knows strides, half a block each, and the perceptron that compresses a block; does not know attention, nor ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dash_kernels.chunks import ChunkGrid
from dash_kernels.eager_selection import chunked, token_index
from dash_kernels.rotary import rotate
from dash_kernels.selection import STRIDE
from dash_kernels.spec import AttentionSpec

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of tokens, [T, D / 2] float32 each."""


class CompressionWeights(NamedTuple):
    """Weights of each KV head: a block plus `positions`, flattened, passes `inner`, ReLU and `outer`.

    positions: [Hkv, 32, D]
    inner:     [Hkv, 32 x D, E]
    outer:     [Hkv, E, D]
    """

    positions: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor


def strides_of(x: torch.Tensor, chunks: ChunkGrid, spec: AttentionSpec) -> torch.Tensor:
    """Tokens of x [B, S, Hkv, D] by stride, [B, slots x C / 16, 16, Hkv, D]; zeros fill an incomplete chunk."""
    return chunked(x, chunks, spec).flatten(1, 2).unflatten(1, (-1, STRIDE))


def compress(strides: torch.Tensor, weights: CompressionWeights, own: torch.Tensor | None = None) -> torch.Tensor:
    """Compress the blocks that end with some strides.

    The perceptron's first layer is a sum over the two halves of a block, so that no stride is held or multiplied twice.

    Args:
        strides: [B, m, 16, Hkv, D]; each stride of a document follows the one before it.
        own: int64, places of the strides that end a block; None for all. The first one of a document has no block, and
            its result is not to be read.

    Returns:
        [B, len(own), Hkv, D] in the dtype of strides.
    """
    positions, inner, outer = (weight.to(strides.dtype) for weight in weights)
    flat = strides.transpose(2, 3).flatten(3)  # [B, m, Hkv, 16 x D]
    begins, ends = (torch.einsum("bmhx,hxe->bmhe", flat, half) for half in inner.chunk(2, dim=1))
    before = begins.roll(1, dims=1)  # of the stride before
    if own is not None:
        before, ends = before[:, own], ends[:, own]
    bias = torch.einsum("hx,hxe->he", positions.flatten(1), inner)
    return torch.einsum("bmhe,hed->bmhd", F.relu(before + ends + bias), outer)


def rotate_compressed(
    keys: torch.Tensor, angles: Angles | None, chunks: ChunkGrid, spec: AttentionSpec
) -> torch.Tensor:
    """Rotate compressed keys [B, slots x C / 16, Hkv, D] by the angle of their block's 17th token.

    Args:
        angles: of the tokens of the chunks; None leaves the keys as they are.
    """
    if angles is None:
        return keys
    tokens = token_index(chunks, spec, keys.device)[:, ::STRIDE].flatten()
    existing = tokens.clamp(max=chunks.tokens - 1)  # a stride without tokens is in the future of every query
    return rotate(keys.contiguous(), *(angle[existing] for angle in angles))

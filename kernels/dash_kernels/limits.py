"""Limits of the kernels and the size rules that memory plans share with them.

Knows numbers; does not know torch, Triton or devices, so configuration code can import it anywhere.
"""

from __future__ import annotations

MAX_TRITON_HEAD_DIM = 256
MAX_TRITON_GROUP = 16
"""Query heads of a KV head."""
MAX_TRITON_SHARPNESS = 200.0
"""Largest routing_scale x max(1, 1 / prior_sigma). The kernels round a query's scores of a chunk in two ways (see
`triton/key_gradient.py`), and sharp routing magnifies the difference."""
MAX_SMALL_CHUNK = 64 * 128
"""Tokens x head_dim of a chunk, each rounded up to a power of two, where shared memory is scarce: in float32, and in
16 bits on GPUs with less shared memory than Hopper."""
MAX_SLAB_BYTES = 256 * 2**20
"""Selection bits, one per token and chunk, that the key gradients hold at a time."""
FP8_MULTIPLE = 16
"""Rows and columns of the second matrix of an FP8 product are multiples of this."""
FP8_LARGEST = 448.0
"""The largest number of E4M3, to which the largest number of a row is scaled."""
FP8_SMALLEST = 2.0**-100
"""The least number that a row is scaled by, so that a row of zeros has a scale, and no scale overflows."""
TILE_ROWS = 64
"""Rows of a tile. Hopper: the rows of one warp group's matrix instruction."""


def padded(size: int) -> int:
    """Next power of two."""
    return 1 << (size - 1).bit_length()


def tile_tokens(group: int, chunk_size: int) -> int:
    """Tokens of a tile for a group of query heads: a power of two that divides the chunk, at least 16 rows of heads."""
    tokens = max(16 // padded(group), 1)
    while tokens * 2 * padded(group) <= TILE_ROWS and chunk_size % (tokens * 2) == 0:
        tokens *= 2
    return tokens


def fits_small_chunk(head_dim: int, chunk_size: int) -> bool:
    """Tell whether a chunk stays within `MAX_SMALL_CHUNK`; the kernels pad it to 64 tokens at least."""
    return padded(head_dim) * max(padded(chunk_size), 64) <= MAX_SMALL_CHUNK

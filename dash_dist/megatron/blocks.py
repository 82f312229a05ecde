"""Rectangular blocks that make up consecutive elements of a flattened tensor.

Knows shapes alone; does not know tensors or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """One block of a tensor, whose elements follow each other in the flattened tensor.

    Attributes:
        offsets: of its first element, by dimension.
        sizes: by dimension.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def blocks_of(shape: Sequence[int], start: int, stop: int) -> Iterator[Block]:
    """Yield the fewest blocks that make up the elements from `start` to `stop`, in their order.

    A matrix gives at most three: the end of a row, whole rows, and the beginning of a row. Each further dimension adds
    at most two.

    Args:
        shape: of the whole tensor, which has an element at least.
        start: first element, in the flattened tensor.
        stop: element after the last one.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield Block((start,), (stop - start,))
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        yield from _in_row(inner, last, start - last * row, stop - last * row)
        return
    yield from _in_row(inner, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Block((first, *(0 for _ in inner)), (last - first, *inner))
    yield from _in_row(inner, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Block]:
    for offsets, sizes in blocks_of(shape, start, stop):
        yield Block((row, *offsets), (1, *sizes))

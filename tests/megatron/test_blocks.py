"""Blocks make up exactly the elements that are asked for, in their order."""

import itertools
import math
import operator

import pytest
import torch

from dash_dist.megatron.blocks import blocks_of


@pytest.mark.parametrize("shape", [(7,), (3, 5), (5, 1), (1, 4), (2, 3, 4), (3, 1, 2), (2, 2, 3, 2)])
def test_blocks_of_every_slice(shape: tuple[int, ...]) -> None:
    elements = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(elements.numel() + 1), 2):
        blocks = list(blocks_of(shape, start, stop))
        found = [elements[tuple(map(slice, offsets, map(operator.add, offsets, sizes)))] for offsets, sizes in blocks]
        assert [tuple(block.shape) for block in found] == [sizes for _, sizes in blocks]
        assert [int(element) for block in found for element in block.flatten()] == list(range(start, stop))
        assert len(blocks) <= 2 * len(shape) - 1


def test_a_whole_tensor_is_one_block() -> None:
    assert list(blocks_of((4, 3, 2), 0, 24)) == [((0, 0, 0), (4, 3, 2))]
    assert list(blocks_of((4, 3), 2, 11)) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]

"""Operations and bytes of PyTorch's operators, from the shapes that a trace gives.

Knows matrix products, and element-wise operators whose traffic follows from their tensors; of the others nothing is
known, and nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_FIRST_OF_PRODUCT = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::_scaled_mm": 0}
"""Operator -> place of the first matrix among its arguments; the second one follows."""

_ITEM_SIZES = {
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "float": 4,
    "double": 8,
    "long": 8,
    "long int": 8,
    "int": 4,
    "bool": 1,
    "unsigned char": 1,
}
_ELEMENTWISE = frozenset(
    f"aten::{name}" for name in ("add", "sub", "mul", "div", "neg", "silu", "sigmoid", "rsqrt", "sqrt", "pow", "exp")
)
_IN_PLACE = frozenset(f"{name}_" for name in _ELEMENTWISE)
_WRITING = frozenset(("aten::fill_", "aten::zero_"))


def product_flops(name: str, arguments: Mapping[str, Any]) -> float | None:
    """Return the operations of a matrix product; None for another operator, or one whose shapes are not known.

    Args:
        arguments: `args` of the operator's event.
    """
    first, shapes = _FIRST_OF_PRODUCT.get(name), arguments.get("Input Dims")
    if first is None or shapes is None or len(shapes) < first + 2:
        return None
    a, b = shapes[first : first + 2]
    if len(a) < 2 or len(b) < 2:
        return None
    return 2.0 * math.prod(a) * b[-1]


def moved_bytes(name: str, arguments: Mapping[str, Any]) -> float | None:
    """Return the bytes that an element-wise operator must read and write; None for another operator."""
    shapes, types = arguments.get("Input Dims"), arguments.get("Input type")
    if shapes is None or types is None:
        return None
    strides = arguments.get("Input Strides") or shapes
    tensors = [
        (math.prod(shape), _ITEM_SIZES[kind], _stored(shape, stride) * _ITEM_SIZES[kind])
        for shape, stride, kind in zip(shapes, strides, types, strict=False)
        if kind in _ITEM_SIZES and shape  # a number is a tensor without dimensions
    ]
    if not tensors:
        return None
    sizes = [size for *_, size in tensors]
    if name == "aten::copy_":
        return float(sum(sizes[:2])) if len(sizes) > 1 else None
    if name in _WRITING:
        return float(sizes[0])
    if name in _IN_PLACE:
        return float(sum(sizes) + sizes[0])
    if name in _ELEMENTWISE:
        written = max(elements for elements, *_ in tensors) * max(item for _, item, _ in tensors)
        return float(sum(sizes) + written)
    return None


def _stored(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the elements in memory: those of an expanded dimension, whose stride is 0, are one."""
    return math.prod(size for size, stride in zip(shape, strides, strict=False) if stride != 0)

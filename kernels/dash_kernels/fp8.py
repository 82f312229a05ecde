"""Matrix products of FP8 numbers: matrices cast with a scale for each row, and the product of two of them.

Knows matrices on one device; does not know linears, gradients nor ranks. On GPUs a Triton kernel casts and
`torch._scaled_mm` multiplies; elsewhere PyTorch computes the same function.

A scale for each row is the cheapest one to find: a row fits into a program's registers, so that one pass over memory
reads it, finds its largest number and writes it. One scale for a whole tensor needs a pass of its own.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from dash_kernels.limits import FP8_LARGEST, FP8_MULTIPLE, FP8_SMALLEST
from dash_kernels.ranges import ranged
from dash_kernels.spec import require

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class ScaledRows:
    """A matrix [M, K]: values x scales.

    Attributes:
        values: [M, K] E4M3, contiguous.
        scales: [M, 1] float32.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in another dtype, [M, K]."""
        return self.values.to(dtype) * self.scales.to(dtype)


@ranged("fp8 cast")
def cast_rows(x: torch.Tensor) -> ScaledRows:
    """Cast a matrix to E4M3, each row scaled so that its largest number becomes 448.

    Rounding is to the nearest, with a relative error of up to 2^-4, or 2^-10 x scale for numbers below 2^-6 x scale.
    A row with a number that is not finite gives products that are not finite.

    Args:
        x: [M, K]; rows that are not contiguous are copied first.

    Raises:
        ValueError: `x` is not a matrix.
    """
    require(x.dim() == 2, f"x has shape {tuple(x.shape)}: give a matrix [M, K]")
    x = x.contiguous()
    if _takes_triton(x):
        from dash_kernels.triton.fp8 import cast

        return ScaledRows(*cast(x))
    wide = x.float()
    largest = wide.abs().amax(dim=1, keepdim=True).clamp(min=FP8_SMALLEST)  # [M, 1]
    return ScaledRows((wide * (FP8_LARGEST / largest)).to(E4M3), largest / FP8_LARGEST)


def scaled_product(a: ScaledRows, b: ScaledRows, dtype: torch.dtype, *, fast: bool) -> torch.Tensor:
    """Multiply a [M, K] by the transpose of b [N, K].

    Args:
        dtype: of the result; bfloat16 on GPUs.
        fast: add up in the fewer bits of Hopper's matrix units, without a sum in float32 every 128 products.

    Returns:
        [M, N].

    Raises:
        ValueError: K differs, or K or N is not a multiple of 16.
    """
    (_, inner), (columns, other) = a.values.shape, b.values.shape
    require(
        inner == other and inner % FP8_MULTIPLE == 0 and columns % FP8_MULTIPLE == 0,
        f"a is {tuple(a.values.shape)} and b {tuple(b.values.shape)}: give [M, K] and [N, K] with K and N multiples "
        f"of {FP8_MULTIPLE}",
    )
    if not a.values.is_cuda:
        return emulated_product(a, b, dtype)
    return torch._scaled_mm(a.values, b.values.t(), a.scales, b.scales.t(), out_dtype=dtype, use_fast_accum=fast)


def emulated_product(a: ScaledRows, b: ScaledRows, dtype: torch.dtype) -> torch.Tensor:
    """Compute `scaled_product` in float32, on any device."""
    product = a.values.float() @ b.values.float().t()
    return (product * a.scales * b.scales.t()).to(dtype)


def _takes_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None

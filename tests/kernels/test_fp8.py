"""Casts and products in FP8, in PyTorch and in Triton, against the numbers that they stand for."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from dash_kernels.fp8 import ScaledRows, cast_rows, emulated_product, scaled_product
from dash_kernels.limits import FP8_LARGEST, FP8_SMALLEST
from tests.kernels.attention_inputs import DEVICE

SHAPES = [(37, 48), (1, 16), (5, 2064), (3, 16_384 + 48), (2, 2 * 16_384)]  # the last ones are read twice


@pytest.fixture(autouse=True)
def _interpreter_rounds() -> Iterator[None]:
    """Triton's interpreter cuts digits off where it casts to FP8: let PyTorch cast there."""
    cast = interpreter.InterpreterBuilder.create_fp_to_fp

    def rounded(self: Any, source: Any, to: Any, mode: Any) -> Any:
        if to.scalar != interpreter.tl.float8e4nv:
            return cast(self, source, to, mode)
        numbers = torch.from_numpy(source.data).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(numbers.view(torch.uint8).numpy().astype(np.uint8), to.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_fp_to_fp", rounded):
        yield


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of sizes from 1e-20 to 1e20, and one of zeros where there are several."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator)
    x *= 10.0 ** torch.linspace(-20, 20, rows)[:, None]
    x[1:2] = 0.0
    return x.to(DEVICE, dtype)


def in_triton(x: torch.Tensor) -> ScaledRows:
    with mock.patch("dash_kernels.fp8._takes_triton", return_value=True):
        return cast_rows(x)


def in_torch(x: torch.Tensor) -> ScaledRows:
    with mock.patch("dash_kernels.fp8._takes_triton", return_value=False):
        return cast_rows(x)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_gives_the_bits_of_pytorch(shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])):
        x = matrix(*shape, dtype).nan_to_num()
        found, wanted = in_triton(x), in_torch(x)
        assert torch.equal(found.scales, wanted.scales)
        assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_rounded_to_the_nearest(shape: tuple[int, int]) -> None:
    x = matrix(*shape).double()
    cast = in_torch(x)
    scales = x.abs().amax(dim=1, keepdim=True).clamp(min=FP8_SMALLEST) / FP8_LARGEST
    torch.testing.assert_close(cast.scales.double(), scales, rtol=1e-6, atol=0.0)
    bound = torch.maximum(2.0**-4 * x.abs(), 2.0**-10 * scales)
    assert ((cast.numbers(torch.float64) - x).abs() <= bound * (1 + 1e-5)).all()
    assert (cast.values.float().abs().amax(dim=1) == FP8_LARGEST).sum() >= len(x) - 1  # but the row of zeros


def test_rows_do_not_depend_on_each_other() -> None:
    x = matrix(7, 96)
    for cast in (in_torch, in_triton):
        whole = cast(x)
        for row in range(len(x)):
            alone = cast(x[row : row + 1])
            assert torch.equal(alone.scales, whole.scales[row : row + 1])
            assert torch.equal(alone.values.float(), whole.values[row : row + 1].float())


def test_columns_of_a_view_are_cast() -> None:
    x = torch.randn(48, 32, device=DEVICE)
    assert torch.equal(cast_rows(x.t()).numbers(torch.float32), cast_rows(x.t().contiguous()).numbers(torch.float32))


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(number: float) -> None:
    x, weight = torch.randn(3, 32, device=DEVICE), torch.randn(16, 32, device=DEVICE)
    x[1, 5] = number
    for cast in (in_torch, in_triton):
        found = emulated_product(cast(x), cast(weight), torch.float32)
        assert not found[1].isfinite().any()
        assert found[::2].isfinite().all()


@pytest.mark.parametrize(("rows", "inner", "columns"), [(37, 48, 32), (1, 16, 16), (130, 272, 80)])
def test_a_product_is_that_of_the_numbers(rows: int, inner: int, columns: int) -> None:
    a, b = cast_rows(torch.randn(rows, inner)), cast_rows(torch.randn(columns, inner))
    expected = a.numbers(torch.float64) @ b.numbers(torch.float64).t()
    for fast in (True, False):
        found = scaled_product(a, b, torch.float32, fast=fast)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give a matrix \[M, K\]"):
        cast_rows(torch.randn(2, 3, 16))
    for a, b in (((4, 16), (16, 32)), ((4, 24), (16, 24)), ((4, 16), (8, 16))):
        with pytest.raises(ValueError, match="with K and N multiples of 16"):
            scaled_product(cast_rows(torch.randn(a)), cast_rows(torch.randn(b)), torch.float32, fast=True)


SHAPES_OF_1B = [(3072, 2048), (2048, 2048), (16_384, 2048), (2048, 8192)]  # out, in


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with FP8")
@pytest.mark.parametrize("tokens", [1, 7, 1000, 4097])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 80), *SHAPES_OF_1B])
@pytest.mark.parametrize("fast", [True, False])
def test_products_on_a_gpu_are_the_emulated_ones(tokens: int, outputs: int, inputs: int, fast: bool) -> None:
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    x, weight = (
        torch.randn(rows, inputs, generator=generator, device=DEVICE).mul(inputs**-0.25).bfloat16()
        for rows in (tokens, outputs)
    )
    x *= 10.0 ** torch.linspace(-3, 3, tokens, device=DEVICE)[:, None]
    a, b = cast_rows(x), cast_rows(weight)
    found = scaled_product(a, b, torch.bfloat16, fast=fast)
    expected = a.numbers(torch.float64) @ b.numbers(torch.float64).t()  # [tokens, outputs]
    error = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
    # bfloat16 rounds by 2^-9; Hopper's units keep 14 bits of a sum.
    assert error.max() < (2.0**-5 if fast else 2.0**-8)
    assert torch.equal(found, scaled_product(a, b, torch.bfloat16, fast=fast))
    emulated = emulated_product(a, b, torch.bfloat16).double()
    assert ((emulated - expected).norm(dim=1) / expected.norm(dim=1)).max() < 2.0**-8

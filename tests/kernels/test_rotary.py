"""Rotation and division of a projection, against complex numbers in float64, in PyTorch and in Triton's interpreter."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from dash_kernels.rotary import rotate, split_projection
from tests.kernels.attention_inputs import DEVICE

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["torch", "triton"])
def dtypes(request: pytest.FixtureRequest) -> Iterator[tuple[torch.dtype, ...]]:
    """The dtypes of a way to compute, which is chosen for the test."""
    if request.param == "torch":
        with mock.patch("dash_kernels.rotary._takes_triton", return_value=False):
            yield torch.float64, torch.float32
        return
    with mock.patch("dash_kernels.rotary._takes_triton", return_value=True):
        yield torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])


def angles_of(tokens: int, head_dim: int) -> torch.Tensor:
    return torch.rand(tokens, head_dim // 2, dtype=torch.float64, device=DEVICE) * 6.28


def reference(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Channels i and i + D / 2 of x [B, T, H, D] as a complex number, turned by the token's angle."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm()).nan_to_num(torch.inf))


@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(1, 37, 3, 16), (2, 20, 1, 24)])
def test_rotation(dtypes: tuple[torch.dtype, ...], batch: int, tokens: int, heads: int, head_dim: int) -> None:
    for dtype in dtypes:
        angles = angles_of(tokens, head_dim)
        # A view whose heads lie apart, as a slice of a projection's.
        x = torch.randn(batch, tokens, heads + 1, head_dim, device=DEVICE).to(dtype)[:, :, 1:].requires_grad_()
        grad = torch.randn(batch, heads, tokens, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
        out = rotate(x, angles.cos().float(), angles.sin().float())
        (dx,) = torch.autograd.grad(out, x, grad)
        tolerance = max(TOLERANCE[dtype], 1e-7)  # angles are float32
        assert error(out, reference(x, angles)) < tolerance
        assert error(dx, reference(grad, -angles)) < tolerance
        assert out.is_contiguous()
        assert out.dtype == dx.dtype == dtype
        assert torch.equal(out, rotate(x, angles.cos().float(), angles.sin().float()))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("batch", "kv_heads", "group", "head_dim"), [(1, 2, 4, 16), (3, 1, 1, 10), (2, 3, 2, 8)])
def test_a_projection_is_divided(
    dtypes: tuple[torch.dtype, ...], turned: bool, batch: int, kv_heads: int, group: int, head_dim: int
) -> None:
    tokens = 21
    for dtype in dtypes:
        angles = angles_of(tokens, head_dim)
        mixed = torch.randn(tokens, batch, kv_heads * (group + 2) * head_dim, device=DEVICE).to(dtype).requires_grad_()
        given = (angles.cos().float(), angles.sin().float()) if turned else ()
        outputs = split_projection(mixed, kv_heads, head_dim, *given)
        grads = [torch.randn(output.shape, device=DEVICE).to(dtype) for output in outputs]
        grads[1] = grads[1].transpose(0, 1).contiguous().transpose(0, 1)  # as an exchange may return it
        (found,) = torch.autograd.grad(outputs, mixed, grads)

        wide = mixed.detach().double().requires_grad_()
        by_head = wide.unflatten(2, (kv_heads, group + 2, head_dim)).transpose(0, 1)
        wanted = [by_head[..., :group, :].flatten(2, 3), by_head[..., group, :], by_head[..., group + 1, :]]
        if turned:
            wanted[:2] = [reference(x, angles) for x in wanted[:2]]
        (gradient,) = torch.autograd.grad(wanted, wide, [grad.double() for grad in grads])
        tolerance = max(TOLERANCE[dtype], 1e-7)
        for output, want in zip(outputs, wanted, strict=True):
            assert output.is_contiguous()
            assert error(output, want.detach()) < tolerance
        assert error(found, gradient) < tolerance


def test_what_does_not_fit_is_refused() -> None:
    x, angles = torch.randn(1, 8, 2, 16), torch.zeros(8, 8)
    with pytest.raises(ValueError, match=r"give \[T, D / 2\] = \(8, 8\)"):
        rotate(x, angles[:4], angles)
    with pytest.raises(ValueError, match="contiguous"):
        rotate(x, angles.t(), angles)
    with pytest.raises(ValueError, match="contiguous in an even D"):
        rotate(x[..., :15], angles, angles)
    with pytest.raises(ValueError, match=r"give \[T, B, 2 x \(G \+ 2\) x 16\]"):
        split_projection(torch.randn(8, 1, 2 * 2 * 16), 2, 16)

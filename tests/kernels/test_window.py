"""Window attention against the float64 reference and against transformers' mask."""

import pytest
import torch

from dash_kernels.reference import reference_window_attention
from dash_kernels.window import Segments, window_attention


def draw(tokens: int, dtype: torch.dtype, *, heads: int = 6, batch: int = 1, device: str = "cpu") -> list[torch.Tensor]:
    """q, k, v and a gradient of the output, of `tokens` tokens."""
    shapes = [(batch, tokens, number, 16) for number in (heads, 2, 2, heads)]
    return [torch.randn(shape, dtype=torch.float64, device=device).to(dtype) for shape in shapes]


def with_gradients(out: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor], least: float = 1.0) -> list[float]:
    """Relative error of the output and of each gradient; NaN counts as infinite.

    Args:
        least: what a norm counts as at least. With a window of 1 the gradients of q and k are zero, but for rounding.
    """
    pairs = zip(found, wanted, strict=True)
    return [float(((got - want).norm() / want.norm().clamp(min=least)).nan_to_num(torch.inf)) for got, want in pairs]


@pytest.mark.parametrize("window", [1, 31, 128, 1000])
@pytest.mark.parametrize("cuts", [(), (1, 130, 131, 290)])
def test_equals_the_reference(window: int, cuts: tuple[int, ...]) -> None:
    tokens = 333
    edges = torch.tensor([0, *cuts, tokens], dtype=torch.int32)
    *inputs, grad = draw(tokens, torch.float64, batch=2)
    inputs = [x.requires_grad_() for x in inputs]
    lengths = edges.diff().tolist()
    out = window_attention(*inputs, Segments(lengths, lengths), window=window)
    wanted = reference_window_attention(*inputs, window=window, cu_seqlens=edges)
    assert max(errors(with_gradients(out, inputs, grad), with_gradients(wanted, inputs, grad))) < 1e-12


@pytest.mark.parametrize("window", [5, 200])
def test_the_last_queries_alone(window: int) -> None:
    """The rows of the last queries of a segment, and the keys' gradients from them."""
    tokens, last = 300, 140
    *inputs, grad = draw(tokens, torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    q, k, v = inputs
    out = window_attention(q[:, -last:], k, v, window=window)
    wanted = reference_window_attention(*inputs, window=window)[:, -last:]
    grad = grad[:, -last:]
    assert max(errors(with_gradients(out, inputs, grad), with_gradients(wanted, inputs, grad))) < 1e-12


def test_the_window_is_that_of_transformers() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    window = 4
    allowed = sliding_window_causal_mask_function(window)
    q, k, v, _ = draw(12, torch.float64)
    k.zero_()  # all allowed keys count the same
    out = window_attention(q, k, v, window=window)
    for query in range(12):
        keys = [key for key in range(12) if allowed(0, 0, torch.tensor(query), torch.tensor(key))]
        mean = v[0, keys].mean(0).repeat_interleave(3, 0)
        torch.testing.assert_close(out[0, query], mean)


def test_lower_precisions_and_no_value_outside_the_window() -> None:
    """NaN in values and keys outside of all windows reach nothing."""
    tokens = 200
    inputs64 = draw(tokens, torch.float64)
    inputs64 = [x.bfloat16().double() for x in inputs64]
    *inputs, grad = [x.bfloat16() for x in inputs64]
    inputs = [x.requires_grad_() for x in inputs]
    wanted = [x.detach().double().requires_grad_() for x in inputs]
    found = with_gradients(window_attention(*inputs, window=50), inputs, grad)
    reference = reference_window_attention(*wanted, window=50)
    assert max(errors([x.double() for x in found], with_gradients(reference, wanted, inputs64[3]))) < 1e-2
    q, k, v = (x.detach().clone() for x in inputs)
    k[:, :100], v[:, :100] = torch.nan, torch.nan
    alone = window_attention(q[:, 149:], k, v, window=50)
    assert torch.equal(alone, window_attention(q[:, 149:], k[:, 100:], v[:, 100:], window=50))


def test_no_buffer_grows_with_tokens_times_window() -> None:
    """The largest tensor that a call makes at twice the tokens is one that grows with the tokens alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else (out,)
            self.numbers = max([self.numbers, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
            return out

    *inputs, grad = draw(4096, torch.float32, heads=2)
    inputs = [x.requires_grad_() for x in inputs]
    with Largest() as largest:
        window_attention(*inputs, window=1024).backward(grad)
    assert largest.numbers <= 2 * 128 * (1024 + 128)
    assert inputs[0].grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: window_attention(q, k, v, window=0), "window is 0: give"),
        (lambda q, k, v: window_attention(q, k[:, :3], v[:, :3], window=2), "has 4 queries and 3 keys"),
        (lambda q, k, v: window_attention(q[:, :, :5], k, v, window=2), "Hq a multiple of Hkv"),
        (lambda q, k, v: window_attention(q, k, v, Segments([3], [3]), window=2), "segments have 3 queries"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    q, k, v, _ = draw(4, torch.float32)
    with pytest.raises(ValueError, match=message):
        call(q, k, v)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 100, 5000])
def test_on_a_gpu(dtype: torch.dtype, window: int) -> None:
    """PyTorch's flash kernels, and blocks for float32, with packed documents and grouped heads."""
    tokens = 3000
    edges = torch.tensor([0, 700, 701, tokens], dtype=torch.int32)
    *inputs, grad = draw(tokens, dtype, device="cuda")
    inputs = [x.requires_grad_() for x in inputs]
    lengths = edges.diff().tolist()
    out = window_attention(*inputs, Segments(lengths, lengths), window=window)
    found = [x.double() for x in with_gradients(out, inputs, grad)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = reference_window_attention(*wide, window=window, cu_seqlens=edges.cuda())
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert max(errors(found, with_gradients(wanted, wide, grad.double()), float(grad.norm()))) < limit

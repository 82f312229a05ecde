"""Fresh random inputs, and a call's output with all its gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "q", "k", "v", "summary_query")


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    summary_query: torch.Tensor
    grad: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) for x in vars(self).values()))


def random_inputs(
    seq_len: int,
    *,
    kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 32,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int | None = None,
) -> Inputs:
    """Normal q, k, v, summary_query and output gradient; without a seed another draw at every call. The seed is in a
    failure's output.
    """
    seed = torch.seed() if seed is None else torch.manual_seed(seed).initial_seed()
    print(f"inputs drawn with seed {seed}")
    heads = (group * kv_heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(batch, seq_len, count, head_dim, device=DEVICE, dtype=torch.float64) for count in heads)
    summary_query = torch.randn(kv_heads, head_dim, device=DEVICE, dtype=torch.float64)
    return Inputs(q, k, v, summary_query, torch.randn_like(q)).to(dtype)


def output_and_gradients(function: Callable[..., Any], inputs: Inputs, **settings: Any) -> dict[str, torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.summary_query)]
    result = function(*leaves, **settings)
    out = result[0] if isinstance(result, tuple) else result
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)), strict=True))


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: ((actual[name].double() - expected[name]).norm() / expected[name].norm()).item() for name in expected}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    errors = relative_errors(actual, expected)
    assert max(errors.values()) <= tolerance, errors  # NaN fails as well


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """As `assert_close`, for results that may be zero: without an earlier chunk, summary_query has no gradient."""
    errors = {
        name: ((actual[name].double() - wanted).norm() / wanted.norm().clamp(min=1)).item()
        for name, wanted in expected.items()
    }
    assert max(errors.values()) <= tolerance, errors  # NaN fails as well

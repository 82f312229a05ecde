"""An attention's output that outlives its inputs."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dash_dist.context_parallel.kept_output import KeptOutput, with_kept_output
from dash_dist.context_parallel.recompute import ForwardMemory


def inputs(*, offset: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as views of one tensor, which begin `offset` elements into its storage."""
    numbers = torch.randn(2 * 16 * 3 * 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat((numbers.new_zeros(offset), numbers))[offset:].view(2, 16, 3, 8).unbind(2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, str]:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), "statistics"


def test_views_of_one_tensor_are_told_apart() -> None:
    memory: ForwardMemory[Any] = ForwardMemory()
    mixed = torch.randn(2, 16, 24, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (2 * x).unflatten(-1, (3, 8)).unbind(2)
        out, other = with_kept_output(memory, attend, q, k, v)
        assert other == "statistics"
        return out

    (plain,) = torch.autograd.grad(attend(*(2 * mixed).unflatten(-1, (3, 8)).unbind(2))[0].square().sum(), mixed)
    checkpoint(layer, mixed, use_reentrant=True).square().sum().backward()
    assert mixed.grad is not None
    assert torch.equal(mixed.grad, plain)
    assert len(memory) == 0


def test_inputs_are_freed_and_the_output_is_not_copied() -> None:
    memory: ForwardMemory[Any] = ForwardMemory()
    given = inputs()
    storage = given[0].untyped_storage()
    with torch.no_grad():
        out, _ = with_kept_output(memory, attend, *given)
    del given
    gc.collect()
    assert torch._C._storage_Use_Count(storage._cdata) == 1  # this test's own
    (kept,) = memory._passes.values()
    assert kept.out.data_ptr() == out.data_ptr()


def test_a_call_that_is_never_repeated_is_freed() -> None:
    memory: ForwardMemory[Any] = ForwardMemory()
    with torch.no_grad():
        out, _ = with_kept_output(memory, attend, *inputs())
    (kept,) = memory._passes.values()
    alive = weakref.ref(kept)
    del kept, out
    memory.clear()
    assert alive() is None  # without the collector of cycles


@pytest.mark.parametrize("offset", [0, 5])
def test_recomputed_inputs_may_lie_elsewhere(offset: int) -> None:
    leaves = [one.detach().clone().requires_grad_() for one in inputs()]
    plain = torch.autograd.grad(attend(*leaves)[0].square().sum(), leaves)
    kept = KeptOutput(attend, inputs(offset=3))
    gradients = kept.gradients(inputs(offset=offset), 2 * kept.out)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(gradients, plain, strict=True))


def test_recomputed_inputs_of_other_strides_are_refused() -> None:
    kept = KeptOutput(attend, inputs())
    with pytest.raises(RuntimeError, match=r"set parallel\.recompute to full"):
        kept.check(tuple(one.contiguous() for one in inputs()))

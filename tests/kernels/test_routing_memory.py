"""A call that is repeated takes the routing of the first one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from dash_kernels import dash_attention, eager, triton
from dash_kernels.spec import Routing

SETTINGS = {"chunk_size": 16, "routing_scale": 8.0}


class Memory:
    """Of one call."""

    def __init__(self) -> None:
        self.kept: list[Routing] = []

    def remember(self, kept: Routing) -> None:
        self.kept.append(kept)

    def recall(self) -> Routing | None:
        return self.kept.pop() if self.kept else None


@pytest.mark.parametrize(
    ("name", "backend"), [("eager", eager), pytest.param("triton", triton, marks=pytest.mark.slow)]
)
def test_the_second_call_does_not_route_and_gives_the_same(name: str, backend: object) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 40, 4, 16), (1, 40, 2, 16), (1, 40, 2, 16), (2, 16))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    plain = dash_attention(*inputs, backend=name, **SETTINGS)
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    memory = Memory()
    with torch.no_grad():
        first = dash_attention(*inputs, backend=name, memory=memory, **SETTINGS)
    assert len(memory.kept) == 1
    with mock.patch.object(backend, "route", side_effect=AssertionError("routed again")):
        second = dash_attention(*inputs, backend=name, memory=memory, **SETTINGS)
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)
    assert not memory.kept
    assert all(map(torch.equal, torch.autograd.grad(second.square().sum(), inputs), expected))


def test_a_call_with_nothing_to_take_routes_and_leaves_nothing() -> None:
    q, k = torch.randn(1, 32, 4, 16, requires_grad=True), torch.randn(1, 32, 2, 16)
    memory = Memory()
    out = dash_attention(q, k, k, torch.zeros(2, 16), backend="eager", memory=memory, **SETTINGS)
    assert torch.equal(out, dash_attention(q, k, k, torch.zeros(2, 16), backend="eager", **SETTINGS))
    assert not memory.kept

"""The fused update is AdamW's: beside float64, in pieces from the host, and after its state has been loaded."""

import copy
from unittest import mock

import pytest
import torch

from dash_dist.megatron import host_moments, torch_adam

SHAPES = (1, 7, 33, 1000)
DEVICES = (
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
)


def optimizer_of(parameters: list[torch.Tensor], share: float = 0.0, *, fused: bool = True) -> torch.optim.AdamW:
    groups = [{"params": parameters[:2], "weight_decay": 0.0}, {"params": parameters[2:], "lr": 3e-2}]
    adam = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    if fused:
        with mock.patch.object(torch_adam, "FUSED_ON", ("cpu", "cuda")):
            torch_adam.fuse(adam)
    if share:
        host_moments.offload_moments(adam, share)
    torch_adam.start_torch_adam(adam)
    return adam


def step(adam: torch.optim.AdamW, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in adam.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(len(parameter), generator=generator).to(parameter)
    adam.step()


@pytest.mark.parametrize("device", DEVICES)
def test_fused_updates_are_those_of_float64(device: str) -> None:
    start = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in SHAPES]
    exact, whole, pieces, resumed = ([one.to(device, copy=True) for one in start] for _ in range(4))
    exact = [one.double() for one in exact]
    reference, fused, away, later = (
        optimizer_of(exact, fused=False),
        optimizer_of(whole),
        optimizer_of(pieces, 0.5),
        optimizer_of(resumed),
    )
    assert [group["fused"] for group in fused.param_groups] == [True, True]
    assert all(state["step"].device.type == device for state in fused.state.values())
    with mock.patch.object(host_moments, "PIECE", 100):
        for number in range(6):
            if number == 3:  # a checkpoint of weights and moments, and the number of updates
                for one, other in zip(whole, resumed, strict=True):
                    other.copy_(one)
                    for name, tensor in fused.state[one].items():
                        later.state[other][name].copy_(copy.deepcopy(tensor))
            for adam in (reference, fused, away, later)[: 3 + (number >= 3)]:
                step(adam, number)
    for one, expected, other, again in zip(whole, exact, pieces, resumed, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(again, one)
        if device == "cuda":
            assert torch.equal(other, one)
        else:  # ends of pieces leave the CPU's vector instructions
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)

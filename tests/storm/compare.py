"""Comparison of two runs: losses step by step, and tensors of the last checkpoints.

Knows torch's distributed checkpoint format, which is independent of the layout; does not know the model.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.storm.errors import StormError


@dataclass(frozen=True)
class Difference:
    """Difference between two sets of losses or tensors.

    Attributes:
        exact: all are equal, bit for bit.
        relative: largest |a - b| / max |a|, with the maximum over each tensor or loss.
        where: name of the tensor or loss with that difference.
        compared: number of losses or tensors.
    """

    exact: bool
    relative: float
    where: str
    compared: int


def compare_losses(expected: Mapping[int, float], found: Mapping[int, float]) -> Difference:
    """Compare the loss of every step; NaN equals NaN. Raises StormError if the steps differ."""
    if expected.keys() != found.keys():
        differing = sorted(expected.keys() ^ found.keys())
        raise StormError(f"only one of the runs has a loss of the steps {differing}")
    return _compare(
        {f"step {step}": torch.tensor(loss, dtype=torch.float64) for step, loss in expected.items()},
        {f"step {step}": torch.tensor(loss, dtype=torch.float64) for step, loss in found.items()},
    )


def compare_weights(expected: Path, found: Path) -> Difference:
    """Compare weights and optimizer state of two checkpoint folders (`.../step_*`).

    Raises StormError if their tensors have other names or shapes.
    """
    if expected.name != found.name:
        raise StormError(f"the last checkpoints are of different steps: {expected.name} and {found.name}")
    return _compare(_tensors(expected), _tensors(found))


def _compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> Difference:
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    if shapes != {name: tensor.shape for name, tensor in found.items()}:
        raise StormError(f"not the same tensors: {sorted(expected)} and {sorted(found)}")
    relative, where, exact = 0.0, "nowhere", True
    for name, tensor in expected.items():
        a, b = tensor.double(), found[name].double()
        if torch.equal(a.nan_to_num(math.inf), b.nan_to_num(math.inf)):
            continue
        exact = False
        scale = max(a.abs().max().item(), torch.finfo(torch.float32).tiny)
        difference = (a - b).abs().max().item() / scale
        if not difference <= relative:  # also where it is NaN
            relative, where = difference, name
    return Difference(exact, relative, where, compared=len(expected))


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(checkpoint / "engine", whole)
        # Safe to unpickle: children of this process wrote both runs.
        state = torch.load(whole, map_location="cpu", weights_only=False)
    return {name: value for name, value in _flat("", state) if isinstance(value, torch.Tensor)}


def _flat(prefix: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _flat(f"{prefix}/{name}", inner)]
    return [(prefix, value)]

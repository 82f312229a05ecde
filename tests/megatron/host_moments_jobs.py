"""What the ranks of the tests of moments on the host do.

The test process itself does not import this: it would load Megatron-core.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dash_dist.errors import RankError
from dash_dist.megatron import host_memory, host_moments, torch_adam
from tests.megatron.megatron_jobs import engine_of, train
from tests.support.models import Case

PIECE = 100  # smaller than most parameters, and no divisor of theirs


def train_save_and_resume(case: Case, folder: Path) -> dict[str, Any]:
    """Losses and weights of five steps with moments on the device, on the host, and partly there; after a checkpoint
    from the host's moments, of the rest of the steps by each of the others; from the device's, by a fused update."""
    seen: dict[str, Any] = {}
    with (
        mock.patch.object(host_moments, "PIECE", PIECE),
        mock.patch.object(host_moments, "_update", wraps=host_moments._update) as update,
    ):
        for share in (0.0, 0.5, 1.0):
            update.reset_mock()
            one = dataclasses.replace(case, offload_moments=share)
            with engine_of(one) as engine:
                losses = train(engine, one, 3)
                engine.start_save(folder / f"{share}", background=True).finish()
                losses += train(engine, one, 2)
                seen[f"run {share}"] = losses, _weights(engine), update.call_count
        for saved, share in ((1.0, 0.0), (0.0, 1.0), (0.5, 1.0)):
            one = dataclasses.replace(case, offload_moments=share)
            with engine_of(one) as engine:
                engine.load(folder / f"{saved}")
                seen[f"resumed {saved} {share}"] = train(engine, one, 2), _weights(engine)
    with mock.patch.object(torch_adam, "FUSED_ON", ("cpu",)), engine_of(case) as engine:
        engine.load(folder / "0.0")
        seen["resumed fused"] = train(engine, case, 2), _weights(engine)
    return seen


def _weights(engine: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


def too_little_memory(case: Case) -> str:
    with mock.patch.object(host_memory, "available_host_bytes", return_value=1000):
        try:
            with engine_of(case):
                return ""
        except RankError as error:
            return str(error)

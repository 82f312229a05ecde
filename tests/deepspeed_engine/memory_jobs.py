"""Bytes that the engine holds between a step's passes and its update, at each ZeRO stage."""

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dash_dist.config.model import ModelConfig
from tests.deepspeed_engine import deepspeed_jobs
from tests.deepspeed_engine.deepspeed_cases import Run, Trained


def held_before_updates(model: ModelConfig, runs: dict[int, Run], settings: dict[str, Any], folder: Path) -> list[int]:
    """Return what a step of each run adds to the bytes of this process's tensors when its gradients are complete."""
    found = []
    with mock.patch.object(deepspeed_jobs, "MODEL", model), mock.patch.object(deepspeed_jobs, "SMALL", settings):
        for run in runs.values():
            before = _tensor_bytes()
            with deepspeed_jobs.engine_of(run, folder) as engine:
                deepspeed_jobs.take_step(engine, run, Trained())
                update, held = engine._zero.update, []

                def measured(update: Any = update, held: list[int] = held) -> Any:
                    held.append(_tensor_bytes())
                    return update()

                with mock.patch.object(engine._zero, "update", measured):
                    deepspeed_jobs.take_step(engine, run, Trained())
            found.append(held[0] - before)
    return found


def _tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

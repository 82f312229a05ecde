"""What the ranks of the tests of LoRA do. The test process does not import this: it would load Megatron-core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dash_dist.config.trainable import TrainableSection
from dash_dist.megatron.weights import global_name
from tests.megatron.megatron_jobs import engine_of, ranks_of
from tests.megatron.trainable_jobs import Seen, look, train
from tests.support.models import Case


def run(case: Case, lora: dict[str, Any] | None, folder: Path | None, steps: int, load: Path | None = None) -> Seen:
    """Train from `load`, or from the first weights, and save to `folder`."""
    trainable = TrainableSection.model_validate({"lora": lora})
    with engine_of(case, trainable=trainable) as engine:
        if load is not None:
            engine.load(load)
        seen = Seen(ranks_of(engine.dims))
        train(engine, case, steps, seen)
        look(engine, seen)
        if folder is not None:
            engine.start_save(folder, background=False).finish()
        return seen


def run_all(cases: dict[str, Case], lora: dict[str, Any] | None, folder: Path, steps: int) -> dict[str, Seen]:
    return {name: run(case, lora, folder / name, steps) for name, case in cases.items()}


def logits(case: Case, lora: dict[str, Any], load: Path, tokens: torch.Tensor) -> torch.Tensor:
    with engine_of(case, trainable=TrainableSection.model_validate({"lora": lora})) as engine:
        engine.load(load)
        with torch.no_grad():
            return engine.model(tokens, None, None)


def refused(case: Case, lora: dict[str, Any] | None, load: Path) -> str:
    with engine_of(case, trainable=TrainableSection.model_validate({"lora": lora})) as engine:
        try:
            engine.load(load)
        except ValueError as error:
            return str(error)
    return ""


def initial(case: Case, lora: dict[str, Any]) -> Seen:
    with engine_of(case, trainable=TrainableSection.model_validate({"lora": lora})) as engine:
        seen = Seen(ranks_of(engine.dims))
        for local_name, parameter in engine.model.named_parameters():
            dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            seen.weights[global_name(engine.model, local_name)] = parameter.detach().clone(), dim
        return seen

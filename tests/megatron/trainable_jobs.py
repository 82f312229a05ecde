"""What the ranks of the tests of `trainable` do. The test process does not import this: it would load Megatron-core."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dash_dist.config.trainable import TrainableSection
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.weights import global_name
from tests.megatron.megatron_jobs import engine_of, micro_batches, ranks_of
from tests.support.models import Case

Parts = dict[str, tuple[torch.Tensor, int | None]]


@dataclass
class Seen:
    """What one rank saw; attributes named as those of `tests.support.models.Measured`."""

    ranks: dict[str, int]
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: Parts = field(default_factory=dict)
    weights: Parts = field(default_factory=dict)
    learning_rates: list[list[float]] = field(default_factory=list)
    state_elements: int = 0
    buffer_elements: int = 0
    flops: int = 0


def section_of(patterns: list[dict[str, Any]] | None) -> TrainableSection:
    return TrainableSection.model_validate({"parameters": patterns})


def train(engine: MegatronEngine, case: Case, steps: int, seen: Seen) -> None:
    for _ in range(steps):
        result = engine.train_step(micro_batches(engine.step, engine.dims, case))
        seen.losses.append(result.loss)
        seen.grad_norms.append(result.grad_norm)
        groups = engine._optimizer.megatron.param_groups
        seen.learning_rates.append([result.learning_rate, *sorted({group["lr"] for group in groups})])


def look(engine: MegatronEngine, seen: Seen) -> None:
    for local_name, parameter in engine.model.named_parameters():
        name = global_name(engine.model, local_name)
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        seen.weights[name] = parameter.detach().clone(), dim
        assert parameter.grad is None or parameter.requires_grad
        if hasattr(parameter, "main_grad"):
            seen.gradients[name] = parameter.main_grad.clone(), dim
    (part,) = engine._optimizer.megatron.chained_optimizers
    seen.state_elements = sum(state["exp_avg"].numel() for state in part.optimizer.state.values())
    seen.buffer_elements = sum(buffer.numel_unpadded for buffer in engine._wrapped.buffers)


def run(case: Case, patterns: list[dict[str, Any]] | None, steps: int) -> Seen:
    with engine_of(case, trainable=section_of(patterns)) as engine:
        seen = Seen(ranks_of(engine.dims))
        with FlopCounterMode(display=False) as counter:
            train(engine, case, 1, seen)
        seen.flops = counter.get_total_flops()
        look(engine, seen)
        clipped = max(1.0, seen.grad_norms[0] / (case.grad_clip or seen.grad_norms[0]))
        first = {name: (gradient * clipped, dim) for name, (gradient, dim) in seen.gradients.items()}
        train(engine, case, steps - 1, seen)
        look(engine, seen)
        seen.gradients = first
        return seen


def run_all(cases: dict[str, tuple[Case, list[dict[str, Any]] | None]], steps: int) -> dict[str, Seen]:
    return {name: run(case, patterns, steps) for name, (case, patterns) in cases.items()}


def save(case: Case, patterns: list[dict[str, Any]] | None, folder: Path, steps: int) -> Seen:
    """Train `steps`, save, and train `steps` more."""
    with engine_of(case, trainable=section_of(patterns)) as engine:
        seen = Seen(ranks_of(engine.dims))
        train(engine, case, steps, seen)
        engine.start_save(folder, background=False).finish()
        train(engine, case, steps, seen)
        look(engine, seen)
        return seen


def resume(
    case: Case, patterns: list[dict[str, Any]] | None, folder: Path, steps: int
) -> tuple[Seen, list[str], dict[str, bool], int]:
    """What a resumed run sees, what it says, whether each trained parameter has moments, and its updates."""
    with engine_of(case, trainable=section_of(patterns)) as engine:
        assert engine.load(folder) == []
        seen = Seen(ranks_of(engine.dims))
        (part,) = engine._optimizer.megatron.chained_optimizers
        names = {id(p): global_name(engine.model, name) for name, p in engine.model.named_parameters()}
        moments = {
            names[id(parameter)]: bool(part.optimizer.state[parameter]["exp_avg"].any())
            for group in part.optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in names
        }
        updates = engine._optimizer.updates
        train(engine, case, steps, seen)
        look(engine, seen)
        return seen, engine.optimizer_changes, moments, updates


def refused(patterns: list[dict[str, Any]]) -> str:
    try:
        with engine_of(Case(), trainable=section_of(patterns)):
            return ""
    except ValueError as error:
        return str(error)

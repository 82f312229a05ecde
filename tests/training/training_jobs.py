"""Jobs of ranks that train in the test's own Python: several runs, one after another, with their outcomes.

The test process itself does not import this: it would load Megatron-core.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from dash_dist.checkpoints.commands import export
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.data.stream import DataStream
from dash_dist.engine.protocol import StepResult
from dash_dist.engine.telemetry import StepTelemetry
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.optimizer import scheduled_learning_rate
from dash_dist.training.schedule import describe_change
from tests.support.attempts import Outcome, attempt


def runs_of_one_rank(config: Path, folder: Path) -> dict[str, Outcome]:
    def alone(name: str, *overrides: str) -> Outcome:
        return attempt(config, f"run.name={name}", "parallel.context=1", "training.steps=3", *overrides)

    checkpoint = folder / "runs" / "short" / "checkpoints" / "step_00000003"
    outcomes = {
        "first": alone("short", "checkpoint.keep=1"),
        "again": alone("short", "checkpoint.keep=1"),
        "never": alone("short", "run.resume=never"),
        "other model": alone("short", "training.steps=6", "model.num_layers=4"),
        "other data": alone("short", "training.steps=6", "data.shuffle_seed=7"),
        "other function": alone(
            "other", f"run.resume={checkpoint}", "training.steps=4", "attention.alpha=2.0", "model.rotary_base=500.0"
        ),
        "extended": alone("extended", f"run.resume={checkpoint}", "training.steps=6"),
        "extended again": alone("extended", "training.steps=7", "optimizer.decay_steps=6"),
        "extended, curve kept": alone(
            "kept", f"run.resume={checkpoint}", "training.steps=6", "optimizer.decay_steps=3"
        ),
        "missing data": alone("no_data", "data.source=files", "data.paths=no_such_folder"),
    }

    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        outcomes["no matplotlib"] = alone("undrawn", "logging.heat_map_layers=null")
        outcomes["no maps"] = alone("without_maps")

    def diverged(engine, micro_batches):
        return StepResult(loss=math.nan, grad_norm=math.nan, learning_rate=1e-3, tokens=512, skipped=True)

    with (
        mock.patch.object(MegatronEngine, "train_step", diverged),
        # No forward pass recorded any.
        mock.patch.object(StepTelemetry, "routing_statistics", return_value=[]),
        mock.patch.object(StepTelemetry, "selection_maps", return_value=[]),
        mock.patch.object(StepTelemetry, "seconds_by_part", return_value={}),
    ):
        outcomes["diverged"] = alone("nan", "training.steps=10", "faults.max_skipped_steps=3")
    return outcomes


def conversion_runs(config: Path, folder: Path) -> dict[str, Outcome]:
    """A conversion phase, a run with adapters from it, an export of that, runs from it, and runs that are refused."""

    def alone(name: str, *overrides: str) -> Outcome:
        return attempt(config, f"run.name={name}", "parallel.context=1", "training.steps=3", *overrides)

    phase = folder / "runs" / "phase" / "checkpoints" / "step_00000003"
    adapted = folder / "runs" / "adapted" / "checkpoints" / "step_00000006"
    outcomes = {
        "phase": alone("phase", "attention.conversion=output", "trainable.parameters=[{match: '*.summary_query'}]"),
        "adapted": alone(
            "adapted",
            f"run.resume={phase}",
            "training.steps=6",
            "trainable.lora={rank: 4}",
            "attention.routing_warmup={start: 1.0, steps: 5}",
        ),
        "typo": alone("typo", "trainable.parameters=[{match: '*sumary_query'}]"),
        "whole model in a phase": alone("whole", "attention.conversion=output"),
    }
    export(adapted, folder / "merged", progress=lambda _: None)
    export(adapted, folder / "adapter", progress=lambda _: None, adapter=True)
    dense = folder / "dense"
    shutil.copytree(folder / "merged", dense)
    settings = json.loads((dense / "config.json").read_text())
    del settings["dash_attention"]
    (dense / "config.json").write_text(json.dumps(settings))
    for name, weights in {"dense": dense, "routed": folder / "merged", "missing": folder / "nothing"}.items():
        outcomes[f"from {name} weights"] = alone(f"from_{name}", f"model.weights={weights}")
    outcomes["resumed"] = alone("from_dense", f"model.weights={dense}", "training.steps=4")
    return outcomes


def schedule_changes() -> dict[str, str | None]:
    """Return the message about each pair of schedules at step 51."""
    saved = OptimizerConfig(lr=2e-3, min_lr=2e-4, warmup_steps=10).schedule(50)
    return {
        "same": describe_change(saved, dict(saved), 51),
        "unknown": describe_change({}, saved, 51),
        "longer": describe_change(saved, saved | {"decay_steps": 100}, 51),
        "other rate": describe_change(saved, saved | {"lr": 1e-3, "warmup_steps": 60, "decay_steps": 100}, 51),
    }


def learning_rates(schedule: dict[str, int | float], steps: int) -> list[float]:
    return [scheduled_learning_rate(schedule, step) for step in range(1, steps + 1)]


class Unreachable(Exception):
    """As the errors of HTTP libraries: neither an OSError nor a ValueError."""


def runs_of_two_ranks(config: Path, folder: Path) -> dict[str, Outcome]:
    documents = folder / "documents"
    files = ["data.source=files", f"data.paths=[{documents}]", "data.shuffle_seed=null", "training.steps=3"]
    outcomes = {
        "triton": attempt(config, "run.name=triton", "attention.backend=triton"),
        "skipping, cp 2": attempt(config, "run.name=skipping_cp", *files),
        "skipping, dp 2": attempt(config, "run.name=skipping_dp", *files, "parallel.context=1"),
        "separate, dp 2": attempt(
            config, "run.name=separate_dp", *files, "parallel.context=1", "data.documents=separate"
        ),
        "separate, cp 2": attempt(config, "run.name=separate_cp", *files, "data.documents=separate"),
        "damaged, stop": attempt(config, "run.name=damaged_stop", *files, "data.damaged=stop"),
    }
    if dist.get_rank() == 0:
        shutil.copytree(folder / "runs" / "skipping_dp", folder / "runs" / "shorter")
    dist.barrier()
    shorter = ["training.steps=5", "training.sequence_length=128", "parallel.context=1"]
    outcomes["shorter sequences"] = attempt(config, "run.name=shorter", *files, *shorter)

    def next_step(stream):
        raise Unreachable("the hub does not answer")

    real = DataStream.next_step
    with mock.patch.object(DataStream, "next_step", next_step if dist.get_rank() == 1 else real):
        outcomes["unreachable"] = attempt(config, "run.name=unreachable")
    return outcomes

"""What ranks do that train in the test's own Python: several runs, one after another, and what came of each.

The test process itself does not import this: it would load Megatron-core.
"""

import errno
import io
import math
import os
import resource
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from rich.console import Console

from dash_dist.config.file import load_config
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.data.stream import DataStream
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.protocol import StepResult
from dash_dist.engine.telemetry import StepTelemetry
from dash_dist.errors import CheckpointError
from dash_dist.megatron.checkpoint import _Plan
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.optimizer import scheduled_learning_rate
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.run.messages import RunSummary
from dash_dist.run.requests import Requests, nothing_asked
from dash_dist.run.state import RunState
from dash_dist.training.checkpoints import CheckpointManager
from dash_dist.training.console import ConsoleProgress
from dash_dist.training.run import train
from dash_dist.training.schedule import describe_change


@dataclass(frozen=True)
class Outcome:
    """Of one call of `train`: its summary or its error, and what it printed."""

    summary: RunSummary | None
    error: str
    output: str


def attempt(config: Path, *overrides: str, requests: Requests = nothing_asked) -> Outcome:
    out = io.StringIO()
    summary, failure = None, ""
    try:
        reporter = ConsoleProgress(Console(file=out, width=200, highlight=False))
        summary = train(load_config(config, overrides), reporter=reporter, requests=requests)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return Outcome(summary, failure, out.getvalue())


def runs_of_one_rank(config: Path, folder: Path) -> dict[str, Outcome]:
    def alone(name: str, *overrides: str) -> Outcome:
        return attempt(config, f"run.name={name}", "parallel.context=1", "training.steps=3", *overrides)

    checkpoint = folder / "runs" / "short" / "checkpoints" / "step_00000003"
    outcomes = {
        "first": alone("short", "checkpoint.keep=1"),
        "again": alone("short", "checkpoint.keep=1"),
        "never": alone("short", "run.resume=never"),
        "other model": alone("short", "training.steps=6", "model.num_layers=4"),
        "other data": alone("short", "training.steps=6", "training.sequence_length=128"),
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


def attempts(config: Path, runs: list[list[str]]) -> list[Outcome]:
    return [attempt(config, *overrides) for overrides in runs]


def runs_to_damage(config: Path) -> None:
    """Checkpoints of steps 2 and 4, and one of step 4 of another model."""
    for name, overrides in {"whole": [], "other": ["model.num_layers=4"]}.items():
        outcome = attempt(
            config, f"run.name={name}", "parallel.context=1", "training.steps=4", "checkpoint.interval=2", *overrides
        )
        assert outcome.summary is not None, outcome.error


class Unreachable(Exception):
    """As the errors of HTTP libraries: neither an OSError nor a ValueError."""


def runs_of_two_ranks(config: Path, folder: Path) -> dict[str, Outcome]:
    documents = folder / "documents"
    files = ["data.source=files", f"data.paths=[{documents}]", "training.steps=3"]
    outcomes = {
        "triton": attempt(config, "run.name=triton", "attention.backend=triton"),
        "skipping, cp 2": attempt(config, "run.name=skipping_cp", *files),
        "skipping, dp 2": attempt(config, "run.name=skipping_dp", *files, "parallel.context=1"),
        "separate, dp 2": attempt(
            config, "run.name=separate_dp", *files, "parallel.context=1", "data.documents=separate"
        ),
        "separate, cp 2": attempt(config, "run.name=separate_cp", *files, "data.documents=separate"),
    }

    def next_step(stream):
        raise Unreachable("the hub does not answer")

    real = DataStream.next_step
    with mock.patch.object(DataStream, "next_step", next_step if dist.get_rank() == 1 else real):
        outcomes["unreachable"] = attempt(config, "run.name=unreachable")
    return outcomes


def dies_while_it_saves(config: Path, folder: Path) -> None:
    """A run whose second checkpoint is never written to its end, and that is killed meanwhile."""
    half_written = folder / "half_written"
    write = _Plan.write

    def write_half(plan):
        if not (folder / "first_is_written").exists():
            written = write(plan)
            (folder / "first_is_written").touch()
            return written
        with open(plan._buckets[0][0], "wb") as file:
            file.write(b"half of a file")
        half_written.write_text(str(os.getpid()))
        time.sleep(1000)

    train_step = MegatronEngine.train_step

    def train_step_until_then(engine, micro_batches):
        if half_written.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(engine, micro_batches)

    with (
        mock.patch.object(_Plan, "write", write_half),
        mock.patch.object(MegatronEngine, "train_step", train_step_until_then),
    ):
        attempt(config, "run.name=killed", "parallel.context=1", "training.steps=100000", "checkpoint.interval=2")


def saves_that_fail(folder: Path) -> list[str]:
    """What a rank is told where rank 1 alone cannot write its file, and where rank 0 alone cannot write the index; each
    in the background and not. Then a save that succeeds."""
    # Context-parallel ranks hold the same weights, which rank 0 writes; a pipeline stage has its own.
    config = load_config(folder / "tiny.yaml", ["parallel.context=1", "parallel.pipeline=2"])
    dims = ParallelDims.initialise(config.parallel, timeout=config.training.distributed_timeout)
    told = []
    try:
        engine = MegatronEngine(
            config.model,
            config.attention,
            config.parallel,
            config.optimizer,
            dims=dims,
            vocab_size=257,
            sequence_length=256,
            total_steps=10,
        )
        control = ControlGroup(timedelta(seconds=60))
        for step, asynchronous in enumerate((True, False), start=1):
            manager = CheckpointManager(folder / "runs" / "failing", control, keep=9, asynchronous=asynchronous)

            def save(manager=manager, step=step) -> str:
                try:
                    manager.start(RunState(step), engine, [{}], merge=lambda states: states[0])
                    manager.finish()
                except CheckpointError as error:
                    return str(error)
                return ""

            limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            if dims.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard_limit))
            told.append(save())
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard_limit))
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), ".metadata")
            with mock.patch.object(_Plan, "write_index", side_effect=full):
                told.append(save())
            told.append(save())
    finally:
        dims.close()
    return told

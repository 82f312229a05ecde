"""What ranks do that train in the test's own Python: several runs, one after another, and what came of each.

The test process itself does not import this: it would load Megatron-core.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from rich.console import Console

from dash_dist.data import DataStream
from dash_dist.megatron import Engine, StepResult
from dash_dist.training import ConsoleProgress, RunSummary, load_config, train
from dash_dist.training.requests import Requests, nothing_asked


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
        "missing data": alone("no_data", "data.source=files", "data.paths=no_such_folder"),
    }

    def diverged(engine, micro_batches):
        return StepResult(loss=math.nan, grad_norm=math.nan, learning_rate=1e-3, tokens=512, skipped=True)

    with (
        mock.patch.object(Engine, "train_step", diverged),
        mock.patch.object(Engine, "routing_statistics", return_value=[]),  # no forward pass recorded any
    ):
        outcomes["diverged"] = alone("nan", "training.steps=10", "faults.max_skipped_steps=3")
    return outcomes


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

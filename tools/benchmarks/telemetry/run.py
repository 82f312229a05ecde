"""Trainings of one process: some steps under PyTorch's profiler, or with the host's clock read between all steps.

Knows the training loop and where its telemetry measures; does not know what is compared. A profiled run has ranges
where the telemetry begins and ends to measure, so that a trace tells the same spans by kernels instead of events.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity

from dash_dist.config.file import load_config
from dash_dist.engine.step_timer import StepTimer
from dash_dist.run.requests import Command
from dash_dist.training.position import RunPosition
from dash_dist.training.run import train
from dash_dist.training.telemetry.recorder import Telemetry
from dash_kernels.ranges import named_range, ranged
from tools.benchmarks.common.configurations import changed, run_section, write_configuration
from tools.benchmarks.common.shapes import SHAPES

WARM_UP_STEPS = 4
PROFILED_STEPS = 6
"""Steps in a trace. The profiler's start delays the first one, which is not compared."""
INTERVAL, ROUTING_INTERVAL, HEAT_MAP_INTERVAL = 4, 12, 24
"""Intervals of `timed`, so that steps with and without telemetry take turns."""
MEASURED = "measured "
"""Begins the ranges of what the telemetry measures."""
STEP = "whole step"


def settings(name: str, shape: str, tokens: int, folder: Path, changes: dict[str, Any]) -> Path:
    """Write a run's configuration into `folder`; returns the file. `changes`: sections and keys that differ."""
    run: dict[str, Any] = {
        "run": run_section(name, folder),
        "model": SHAPES[shape].section(),
        "attention": {"routing_scale": 32},  # at 1 an untrained model selects every chunk
        "parallel": {"recompute": "selective"},
        "data": {"source": "stdlib", "tokenizer": "bytes", "cache": str(folder / "tokens")},
        "optimizer": {"lr": 1e-5},
        "training": {"sequence_length": tokens, "global_batch_size": 1},
        "checkpoint": {"interval": 100_000},
    }
    return write_configuration(changed(run, changes), folder)


def profiled(shape: str, tokens: int, folder: Path, trace: Path) -> Path:
    """Train with a point of every curve at every step, and write the trace of `PROFILED_STEPS`; returns the file of
    the configuration.
    """
    first = WARM_UP_STEPS + 1
    changes = {
        "training": {"steps": first + PROFILED_STEPS},
        "logging": {"interval": 1, "heat_map_layers": []},
    }
    path = settings("profiled", shape, tokens, folder, changes)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    open_step = contextlib.ExitStack()
    calls = 0

    def between_steps() -> Command:
        nonlocal calls
        calls += 1
        open_step.close()
        if calls == first:
            profiler.start()
        if calls == first + PROFILED_STEPS:
            profiler.stop()
        open_step.enter_context(named_range(STEP))
        return Command()

    with _ranges_of_telemetry():
        train(load_config(path), requests=between_steps)
    open_step.close()
    profiler.export_chrome_trace(str(trace))
    return path


@contextlib.contextmanager
def _ranges_of_telemetry() -> Iterator[None]:
    """Make ranges of the spans that the telemetry measures, and of the training part of a step."""
    start, stop, measure = StepTimer.start, StepTimer.stop, Telemetry.measure
    spans: dict[str, contextlib.ExitStack] = {}

    def start_with_range(timer: StepTimer, name: str) -> None:
        spans[name] = contextlib.ExitStack()
        spans[name].enter_context(named_range(MEASURED + name))
        start(timer, name)

    def stop_with_range(timer: StepTimer, name: str) -> None:
        stop(timer, name)
        spans.pop(name).close()

    @contextlib.contextmanager
    def measure_with_range(telemetry: Telemetry, part: str) -> Iterator[None]:
        with named_range(MEASURED + part), measure(telemetry, part):
            yield

    with (
        mock.patch.object(StepTimer, "start", start_with_range),
        mock.patch.object(StepTimer, "stop", stop_with_range),
        mock.patch.object(Telemetry, "measure", measure_with_range),
        mock.patch.object(RunPosition, "train", ranged(MEASURED + "train")(RunPosition.train)),
    ):
        yield


def timed(shape: str, tokens: int, folder: Path, steps: int) -> dict[int, float]:
    """Train and return step -> seconds from its beginning to that of the next step, its logging included.

    The steps before the warm-up's end and the last one are left out. Without Matplotlib no heat maps are drawn.
    """
    layers: list[int] | None = None if draws_heat_maps() else []
    changes = {
        "training": {"steps": steps},
        "logging": {
            "interval": INTERVAL,
            "routing_interval": ROUTING_INTERVAL,
            "heat_map_interval": HEAT_MAP_INTERVAL,
            "heat_map_layers": layers,
        },
    }
    begun: list[float] = []

    def between_steps() -> Command:
        begun.append(time.perf_counter())
        return Command()

    train(load_config(settings("timed", shape, tokens, folder, changes)), requests=between_steps)
    seconds = {step: end - start for step, (start, end) in enumerate(itertools.pairwise(begun), start=1)}
    return {step: one for step, one in seconds.items() if step > WARM_UP_STEPS}


def draws_heat_maps() -> bool:
    """Tell whether the library that draws heat maps is installed."""
    return importlib.util.find_spec("matplotlib") is not None

"""Jobs of two ranks that train runs with stages in the test's own Python.

The test process itself does not import this: it would load Megatron-core.
"""

import math
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

from dash_dist.engine.protocol import StepResult
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.run.requests import Command, Request, Requests
from dash_dist.training import loop
from tests.support.attempts import Outcome, attempt

SHORT = ["training.steps=4"]
LONG = [
    "training.steps=8",
    "training.sequence_length=512",
    "model.positions.type=linear",
    "model.positions.factor=2.0",
    "parallel.context=1",
    "parallel.tensor=2",
    "optimizer.schedule_start=4",
]


def stop_after(steps: int) -> Requests:
    asked = iter(range(10**6))
    return lambda: Command(Request.STOP if next(asked) >= steps else Request.GO_ON)


def runs_with_stages(staged: Path, plain: Path, gated: Path, folder: Path) -> dict[str, Outcome]:
    checkpoint = folder / "runs" / "hand_short" / "checkpoints" / "step_00000004"
    outcomes = {
        "whole": attempt(staged, "run.name=whole"),
        "short, by hand": attempt(plain, "run.name=hand_short", *SHORT),
        "long, by hand": attempt(plain, "run.name=hand_long", f"run.resume={checkpoint}", *LONG),
    }
    for steps in (2, 4, 6):
        name = f"run.name=stopped_{steps}"
        outcomes[f"stopped after {steps}"] = attempt(staged, name, requests=stop_after(steps))
        outcomes[f"continued after {steps}"] = attempt(staged, name)
    outcomes["again"] = attempt(staged, "run.name=whole")
    strict = folder / "strict.yaml"
    outcomes["first gate missed"] = attempt(strict, "run.name=strict")
    outcomes["first gate missed again"] = attempt(strict, "run.name=strict")
    outcomes["misspelt"] = attempt(folder / "misspelt.yaml", "run.name=misspelt")
    outcomes["gate missed"] = attempt(gated, "run.name=gated")
    outcomes["gate still missed"] = attempt(gated, "run.name=gated")
    return outcomes


def models_that_stay(staged: Path) -> list[list[bool]]:
    """Return, at the build of each stage's engine, whether the model of each stage before is still there."""
    models: list[weakref.ref] = []
    alive: list[list[bool]] = []
    real = loop.build_engine

    def build(*arguments, **options):
        alive.append([model() is not None for model in models])
        engine = real(*arguments, **options)
        models.append(weakref.ref(engine.model))
        return engine

    with mock.patch.object(loop, "build_engine", build):
        assert attempt(staged, "run.name=memory").error == ""
    return alive


def rollbacks(staged: Path) -> dict[str, Outcome]:
    """Runs with two steps in a row whose losses are no numbers, near the beginning of the second stage."""
    options = ["faults.max_skipped_steps=1", "checkpoint.interval=2", "checkpoint.keep=9"]
    real = MegatronEngine.train_step

    def run(name: str, bad: set[int]) -> Outcome:
        def train_step(engine: MegatronEngine, micro_batches: list) -> StepResult:
            result = real(engine, micro_batches)
            if engine.step not in bad:
                return result
            bad.discard(engine.step)
            return replace(result, loss=math.nan, skipped=True)

        with mock.patch.object(MegatronEngine, "train_step", train_step):
            return attempt(staged, f"run.name={name}", *options)

    return {"boundary": run("boundary", {6, 7}), "beyond": run("beyond", {5, 6})}

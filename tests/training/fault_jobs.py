"""What ranks do that train through faults in the test's own Python: their runs, and what came of each.

The test process itself does not import this: it would load Megatron-core.
"""

import errno
import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from dash_dist.data.stream import DataStream
from dash_dist.engine.protocol import StepResult
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.write_plan import WritePlan
from dash_dist.run.requests import Command, Request
from dash_dist.training.faults.skipped import SkippedBatches, SkipRecord
from tests.support.attempts import Outcome, attempt

Steps = Callable[[MegatronEngine, list], StepResult]


@dataclass(frozen=True)
class FaultyRun:
    """The outcome at one rank, its weights at the end, and the steps that were really trained, in order."""

    outcome: Outcome
    weights: list[torch.Tensor]
    trained: list[int]


def faulty_run(config: Path, *overrides: str, train_step: Callable[[Steps], Steps], requests=Command) -> FaultyRun:
    """One run whose engines train by `train_step(the real one)`."""
    engines: list[MegatronEngine] = []
    trained: list[int] = []
    real = MegatronEngine.train_step

    def train_and_note(engine, micro_batches):
        if engine not in engines:
            engines.append(engine)
        trained.append(engine.step + 1)
        return real(engine, micro_batches)

    with mock.patch.object(MegatronEngine, "train_step", train_step(train_and_note)):
        outcome = attempt(config, *overrides, requests=requests)
    weights = [weight.detach().clone() for engine in engines for weight in engine.model.parameters()]
    return FaultyRun(outcome, weights, trained)


def undisturbed(real: Steps) -> Steps:
    return real


def bad_once(losses: dict[int, float]) -> Callable[[Steps], Steps]:
    """The first time that these steps come, they have these losses; weights change if it is a number."""
    left = dict(losses)

    def train_step(real: Steps) -> Steps:
        def train(engine, micro_batches):
            step = engine.step + 1
            if step not in left:
                return real(engine, micro_batches)
            loss = left.pop(step)
            if math.isfinite(loss):
                return replace(real(engine, micro_batches), loss=loss)
            engine.step = step
            return StepResult(loss=loss, grad_norm=loss, learning_rate=1e-3, tokens=512, skipped=True)

        return train

    return train_step


def runs_with_bad_losses(config: Path, folder: Path) -> dict[str, FaultyRun]:
    """Bad: a batch, then a row of them, then a spike; without: a run that leaves out the batches that this one did."""

    def run(name: str, losses: dict[int, float], *overrides: str) -> FaultyRun:
        spikes = ["faults.spike_z_score=20.0", "faults.spike_window=10", "faults.max_skipped_steps=2"]
        small = ["parallel.context=1", "checkpoint.asynchronous=false", f"run.name={name}"]
        return faulty_run(config, *small, *spikes, *overrides, train_step=bad_once(losses))

    steps = ["training.steps=18", "checkpoint.interval=4", "checkpoint.keep=3"]
    losses = {4: math.nan, 7: math.inf, 8: math.nan, 9: math.nan, 16: 100.0}
    if dist.get_rank() == 0:
        (folder / "runs" / "without").mkdir(parents=True)
        left_out = [SkippedBatches(first, last, "by the test") for first, last in ((4, 4), (6, 9), (16, 16))]
        SkipRecord(0, left_out).write(folder / "runs" / "without")
    dist.barrier()
    short = ["training.steps=12", "checkpoint.interval=1000"]
    return {
        "bad": run("bad", losses, *steps),
        "without": run("without", {}, *steps),
        "early": run("early", {11: 100.0}, *short),
        "no more": run("no_more", {11: 100.0}, *short, "faults.max_rollbacks=0"),
    }


def runs_with_other_faults(config: Path, folder: Path) -> dict[str, FaultyRun]:
    def notice() -> Command:
        """A notice that rank 1 has from before step 3 on, and rank 0 never."""
        polled.append(None)
        return Command(Request.SAVE, "node b goes") if dist.get_rank() == 1 and len(polled) > 2 else Command()

    def full_disk(real: Steps) -> Steps:
        """From step 4 to step 8 rank 0 can write no file of more than 2 KiB."""

        def train(engine, micro_batches):
            if dist.get_rank() == 0 and engine.step + 1 in (4, 9):
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048 if engine.step + 1 == 4 else hard, hard))
            return real(engine, micro_batches)

        return train

    def away_once(stream):
        """The file server does not answer when rank 1 asks for the fourth batch."""
        asked.append(None)
        if dist.get_rank() == 1 and len(asked) == 4:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "part-0.parquet")
        return next_step(stream)

    polled: list[None] = []
    asked: list[None] = []
    next_step = DataStream.next_step
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    small = ["parallel.context=1", "training.steps=10", "checkpoint.interval=5"]
    outcomes = {
        "notice": faulty_run(config, "run.name=notice", "training.steps=5", train_step=undisturbed, requests=notice),
        "full disk": faulty_run(config, "run.name=full", *small, train_step=full_disk),
        "full for long": faulty_run(
            config, "run.name=for_long", *small, "faults.max_failed_saves=1", train_step=full_disk
        ),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    def write_at_first_never(plan):
        if not (folder / "stuck").exists():
            (folder / "stuck").touch()
            time.sleep(1000)
        return write(plan)

    def slow(real: Steps) -> Steps:
        return lambda engine, micro_batches: (time.sleep(0.4), real(engine, micro_batches))[1]

    write = WritePlan.write
    with mock.patch.object(WritePlan, "write", write_at_first_never):
        outcomes["stuck save"] = faulty_run(
            config, "run.name=stuck", *small, "training.steps=16", "faults.save_timeout_seconds=3", train_step=slow
        )
    with mock.patch.object(DataStream, "next_step", away_once):
        for attempt_name in ("server away", "server back"):
            outcomes[attempt_name] = faulty_run(
                config, "run.name=away", *small, "checkpoint.interval=2", train_step=undisturbed
            )
    return outcomes

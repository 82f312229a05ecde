"""What the ranks of the tests of a step's exchanges do.

The test process itself does not import this: it would load Megatron-core.
"""

import dataclasses
import os
import time
from typing import Any
from unittest import mock

from dash_dist.context_parallel import selective
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.context_parallel.transfer import Transfer
from dash_dist.engine.exchange_statistics import ExchangeStatistics
from dash_dist.megatron import loss as loss_module
from dash_dist.megatron.engine import MegatronEngine
from tests.megatron.megatron_jobs import engine_of, micro_batches
from tests.support.models import Case


def statistics_of_steps(cases: dict[str, Case]) -> dict[str, ExchangeStatistics | None]:
    """Of the second step each, after a first one that nobody asked for."""
    statistics = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            engine.train_step(micro_batches(1, engine.dims, case))
            engine.train_step(micro_batches(0, engine.dims, case))
            statistics[name] = engine.telemetry.exchange_statistics()
    return statistics


def asked_without_a_step() -> list[str]:
    """What is said before the first step, at the question after it, and at another one."""
    answers = []
    case = Case(context=2)
    with engine_of(case) as engine:
        for steps in (0, 1, 0):
            for _ in range(steps):
                engine.train_step(micro_batches(0, engine.dims, case))
            try:
                answers.append(type(engine.telemetry.exchange_statistics()).__name__)
            except RuntimeError as error:
                answers.append(str(error))
    return answers


def passes_remembered(engine: MegatronEngine) -> list[int]:
    """Per layer, forward passes that wait for their recomputation."""
    memories = [attention.memory for _, attention in engine.model.attentions()]
    return [len(memory._passes) for memory in memories if memory is not None]


def step_after_a_failed_one(case: Case) -> dict[str, Any]:
    """A step of a new engine, and of one whose step before, on other data, failed after its first forward pass."""
    seen: dict[str, Any] = {}
    with engine_of(case) as engine:
        seen["undisturbed"] = engine.train_step(micro_batches(0, engine.dims, case))
        seen["remembered after a step"] = passes_remembered(engine)
        seen["undisturbed traffic"] = dataclasses.replace(engine.telemetry.exchange_statistics(), overlap=None)
    with engine_of(case) as engine:
        with mock.patch.object(loss_module, "_summed_loss", side_effect=ZeroDivisionError):
            try:
                engine.train_step(micro_batches(1, engine.dims, case))
            except ZeroDivisionError:
                seen["remembered after a failed step"] = passes_remembered(engine)
        seen["after the failed one"] = engine.train_step(micro_batches(0, engine.dims, case))
        seen["traffic after the failed one"] = dataclasses.replace(engine.telemetry.exchange_statistics(), overlap=None)
    return seen


def a_rank_dies(dying: int) -> tuple[str, str, float]:
    """What the others see when one dies in the second step's first backward pass: error, its cause, seconds."""
    case = Case(context=4, exchange="selective", micro_batch_size=4)
    with engine_of(case) as engine:
        engine.train_step(micro_batches(0, engine.dims, case))
        deliveries = 0

        def fetch(*arguments: Any) -> Transfer:
            nonlocal deliveries
            deliveries += 1
            if engine.dims.rank == dying and deliveries == 3:  # two layers forward, then backward
                os._exit(1)
            return real(*arguments)

        real, started = selective.fetch, time.monotonic()
        with mock.patch.object(selective, "fetch", fetch):
            try:
                engine.train_step(micro_batches(1, engine.dims, case))
            except ExchangeError as error:
                return str(error), str(error.__cause__), time.monotonic() - started
    raise AssertionError("the step went through without a rank")

"""Jobs of the tests of recomputation. The test process itself does not import this: it would load Megatron-core."""

import gc
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch.nn.functional as F

from dash_dist.context_parallel.kept_output import KeptOutput
from dash_dist.megatron import loss as loss_module
from dash_dist.megatron.engine import MegatronEngine
from dash_kernels import eager, window
from tests.megatron.megatron_jobs import engine_of, micro_batches
from tests.support.models import Case


def calls_of_a_step(cases: dict[str, Case]) -> dict[str, dict[str, int]]:
    """Calls in one step, by function of the attention."""
    counted = {}
    for name, case in cases.items():
        calls: Counter[str] = Counter()

        def count(
            stack: ExitStack, owner: Any, function: str, calls: Counter[str] = calls, label: str | None = None
        ) -> None:
            real = getattr(owner, function)

            def call(*arguments: Any, **options: Any) -> Any:
                calls[label or function] += 1
                return real(*arguments, **options)

            stack.enter_context(mock.patch.object(owner, function, call))

        with engine_of(case) as engine, ExitStack() as stack:
            for stage in ("summarize", "route", "attend", "key_gradient"):
                count(stack, eager, stage)
            count(stack, F, "scaled_dot_product_attention", label="dense")
            count(stack, window._Blocks, "forward", label="window")
            engine.train_step(micro_batches(0, engine.dims, case))
        counted[name] = dict(calls)
    return counted


def _waiting(engine: MegatronEngine) -> list[int]:
    return [len(one.memory) for _, one in engine.model.attentions() if one.memory is not None]


def _kept_outputs() -> int:
    gc.collect()
    return sum(isinstance(one, KeptOutput) for one in gc.get_objects())


def passes_that_wait(case: Case) -> dict[str, Any]:
    """Forward passes that wait for their recomputation, per layer, and all outputs that are kept."""
    found: dict[str, Any] = {}
    with engine_of(case) as engine:
        batch = micro_batches(0, engine.dims, case)
        found["loss"] = engine.train_step(batch).loss
        found["after a step"] = _waiting(engine), _kept_outputs()
        engine.evaluate(batch, [batch[0].tokens.shape[1]])
        found["after an evaluation"] = _waiting(engine), _kept_outputs()
    with engine_of(case) as engine:
        with mock.patch.object(loss_module, "_summed_loss", side_effect=ZeroDivisionError):
            try:
                engine.train_step(micro_batches(1, engine.dims, case))
            except ZeroDivisionError:
                found["after a failed step"] = _waiting(engine)
        found["loss after the failed one"] = engine.train_step(batch).loss
        found["after the step that follows"] = _waiting(engine), _kept_outputs()
    return found

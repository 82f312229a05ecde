"""What the ranks of the tests of activation offload do.

The test process itself does not import this: it would load Megatron-core.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch

from dash_dist.errors import RankError
from dash_dist.megatron import host_memory
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.offload import ActivationOffload
from dash_dist.megatron.weights import global_name
from tests.megatron.megatron_jobs import engine_of, micro_batches
from tests.support.models import MODEL, SEQUENCE_LENGTH, Case

DEEP = MODEL.model_copy(update={"num_layers": 4})


def two_steps(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Of each case the results of two steps, the gradients of the second, and (allocated, free) blocks after each."""
    return {name: _two_steps(case) for name, case in cases.items()}


def _two_steps(case: Case) -> dict[str, Any]:
    results, blocks = [], []
    with engine_of(case, model=DEEP) as engine:
        for step in range(2):
            results.append(engine.train_step(micro_batches(step, engine.dims, case)))
            if engine._trained.offload is not None:
                blocks.append(_blocks(engine))
        gradients = {
            global_name(engine.model, name): parameter.main_grad.clone()
            for name, parameter in engine.model.named_parameters()
        }
    return {"results": results, "gradients": gradients, "blocks": blocks}


def _blocks(engine: MegatronEngine) -> tuple[int, int]:
    offload = engine._trained.offload
    assert isinstance(offload, ActivationOffload)
    return offload.pool.allocated, offload.pool.free


def inputs_on_the_host(case: Case) -> tuple[list[int], list[int]]:
    """Blocks in use when each layer of a micro-batch has run, and when it is recomputed."""
    with engine_of(case, model=DEEP) as engine:
        forward: list[int] = []
        backward: list[int] = []

        def look(*_: Any) -> None:
            allocated, free = _blocks(engine)
            (backward if torch._C._current_graph_task_id() != -1 else forward).append(allocated - free)

        for layer in engine.model.decoder.layers:
            layer.register_forward_pre_hook(look)
        engine.train_step(micro_batches(0, engine.dims, case))
        return forward, backward


def failures(case: Case) -> dict[str, Any]:
    """Blocks after failed steps and an evaluation, messages, and the gradients' norm of a step after all of them."""
    seen: dict[str, Any] = {}
    with engine_of(case, model=DEEP) as engine:
        batches = micro_batches(0, engine.dims, case)
        layers = engine.model.decoder.layers

        def fail(where: str, *_: Any) -> None:
            recomputed = torch._C._current_graph_task_id() != -1
            if recomputed == (where == "backward"):
                raise RuntimeError("failed on purpose")

        engine.evaluate(batches, [SEQUENCE_LENGTH])
        seen["evaluation"] = _blocks(engine)
        for number, where in ((2, "forward"), (1, "backward")):
            hook = layers[number].register_forward_pre_hook(functools.partial(fail, where))
            try:
                engine.train_step(batches)
            except RuntimeError as error:
                seen[f"message {where}"] = str(error)
            hook.remove()
            seen[where] = _blocks(engine)
        seen["grad norm"] = engine.train_step(batches).grad_norm
        seen["after"] = _blocks(engine)
    with (
        engine_of(case, model=DEEP) as engine,
        mock.patch.object(host_memory, "available_host_bytes", return_value=2**31),
    ):
        try:
            engine.train_step(batches)
        except RankError as error:
            seen["too little"] = str(error)
    return seen

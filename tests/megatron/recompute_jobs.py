"""Jobs of the tests of recomputation. The test process itself does not import this: it would load Megatron-core."""

import gc
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dash_dist.context_parallel.kept_output import KeptOutput
from dash_dist.megatron import loss as loss_module
from dash_dist.megatron.engine import MegatronEngine
from dash_kernels import eager, window
from tests.megatron.megatron_jobs import engine_of, micro_batches
from tests.megatron.tiled_mlp_jobs import gradients_of
from tests.support.models import MODEL, SEQUENCE_LENGTH, SEQUENCES, Case

UNEVEN = MODEL.model_copy(update={"head_dim": 12, "ffn_hidden_size": 80})
"""A model whose products all have shapes of their own."""


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


def gradients_of_cases(cases: dict[str, Case], trainable: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of the trained parameters in one step."""
    return {name: gradients_of(case, trainable) for name, case in cases.items()}


class _Products(TorchDispatchMode):
    """Counts the rows of matrix products by (inner, outer) size."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.rows[tuple(args[1].shape)] += len(args[0])
        return func(*args, **(kwargs or {}))


def products_of_a_step(cases: dict[str, Case]) -> dict[str, dict[str, float]]:
    """Forward products of each linear in one step, by those that a step needs."""
    hidden, ffn = UNEVEN.hidden_size, UNEVEN.ffn_hidden_size
    q, kv = UNEVEN.num_attention_heads * 12, UNEVEN.num_kv_heads * 12
    shapes = {"qkv": (hidden, q + 2 * kv), "proj": (q, hidden), "fc1": (hidden, 2 * ffn), "fc2": (ffn, hidden)}
    needed = UNEVEN.num_layers * SEQUENCES * SEQUENCE_LENGTH
    counted = {}
    for name, case in cases.items():
        with engine_of(case, model=UNEVEN) as engine, _Products() as products:
            engine.train_step(micro_batches(0, engine.dims, case))
        counted[name] = {linear: products.rows[shape] / needed for linear, shape in shapes.items()}
    return counted


def sums_of_a_step(cases: dict[str, Case]) -> dict[str, int]:
    """Sums of activations over tensor-parallel ranks in the forward passes of one step."""
    counted = {}
    for name, case in cases.items():
        with engine_of(case) as engine, mock.patch.object(mappings, "_reduce", wraps=mappings._reduce) as reduce:
            engine.train_step(micro_batches(0, engine.dims, case))
        counted[name] = reduce.call_count
    return counted


def norm_with_a_reader(cases: dict[str, Case]) -> dict[str, float]:
    """Norm of the gradients where the first layer squares what its recomputed part returns, inside of that part."""
    norms = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            layer = engine.model.decoder.layers[0]
            assert isinstance(layer, nn.Module)
            end = "self_attn_bda" if case.recompute_modules == ("projections",) else "mlp_bda"
            plain = getattr(layer, end)

            def squared(*settings: Any, plain: Any = plain) -> Any:
                return lambda *tensors: plain(*settings)(*tensors).square()

            setattr(layer, end, squared)
            norms[name] = engine.train_step(micro_batches(0, engine.dims, case)).grad_norm
    return norms


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

"""What the ranks of the tests of the padded vocabulary do.

The test process itself does not import this: it would load Megatron-core.
"""

import dataclasses
from unittest import mock

import torch
import torch.nn.functional as F

from dash_dist.megatron import model as model_module
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.parallel import ParallelDims
from dash_dist.megatron.weights import global_name
from tests.megatron.megatron_jobs import engine_of, micro_batches, ranks_of
from tests.support.models import MODEL, Batch, Case, Measured

WIDE = MODEL.model_copy(update={"num_kv_heads": 4})  # can be cut over four ranks


def batches(dims: ParallelDims, case: Case, vocab_size: int) -> list[Batch]:
    """The first step's micro-batches, with tokens of a smaller vocabulary."""
    return [
        dataclasses.replace(batch, tokens=batch.tokens % vocab_size, labels=batch.labels % vocab_size)
        for batch in micro_batches(0, dims, case)
    ]


def steps(cases: dict[str, tuple[Case, int]]) -> dict[str, Measured]:
    """Loss, gradients and the weights before the first step of each (case, vocabulary)."""
    measured = {}
    for name, (case, vocab_size) in cases.items():
        with engine_of(case, model=WIDE, vocab_size=vocab_size) as engine:
            measured[name] = one = Measured(ranks_of(engine.dims))
            parameters = {global_name(engine.model, name): p for name, p in engine.model.named_parameters()}
            dims = {
                name: p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
                for name, p in parameters.items()
            }
            one.weights = {name: (p.detach().clone(), dims[name]) for name, p in parameters.items()}
            result = engine.train_step(batches(engine.dims, case, vocab_size))
            one.losses, one.tokens, one.grad_norm = [result.loss], result.tokens, result.grad_norm
            one.gradients = {name: (p.main_grad.clone(), dims[name]) for name, p in parameters.items()}
    return measured


def unpadded_in_float64(
    models: dict[str, tuple[Case, int, dict[str, torch.Tensor]]],
) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients of each (case, vocabulary, full weights without padding), by a model without padding."""
    results = {}
    for name, (case, vocab_size, weights) in models.items():
        with (
            mock.patch.object(model_module, "padded_vocab_size", lambda size: size),
            engine_of(case, model=WIDE, vocab_size=vocab_size) as engine,
        ):
            results[name] = _in_float64(engine, case, vocab_size, weights)
    return results


def _in_float64(
    engine: MegatronEngine, case: Case, vocab_size: int, weights: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    model = engine.model.double()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches(engine.dims, case, vocab_size):
        logits = model(batch.tokens, None, None)  # [b, s, vocab]
        assert logits.dtype == torch.float64
        assert logits.shape[-1] == vocab_size
        total = total + F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask], reduction="sum")
        tokens += int(batch.loss_mask.sum())
    loss = total / tokens
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, gradients, strict=True))


def loss_with_other_padding(case: Case, vocab_size: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a step with the padded rows as drawn, and with large ones."""
    found = []
    for fill in (None, 1e4):
        with engine_of(case, model=WIDE, vocab_size=vocab_size) as engine:
            if fill is not None:
                engine.model.output_layer.weight.data[vocab_size:] = fill
            result = engine.train_step(batches(engine.dims, case, vocab_size))
            found.append((result.loss, result.grad_norm))
    return found

"""Jobs of the ranks of the tests of the held-out loss.

The test process itself does not import this: it would load Megatron-core.
"""

from typing import Any

import torch
import torch.nn.functional as F

from dash_dist.context_parallel import DashAttention
from dash_dist.engine.protocol import BucketLoss
from dash_dist.megatron.engine import MegatronEngine
from tests.megatron.megatron_jobs import engine_of, micro_batches
from tests.support.models import Batch, Case, global_batch, packed_documents_alone

EDGES = (16, 48, 128)


def evaluations(cases: dict[str, Case]) -> dict[str, tuple[BucketLoss, ...]]:
    """Losses by position of the initial weights, by case."""
    found = {}
    for name, case in cases.items():
        with engine_of(case) as engine:
            found[name] = engine.evaluate(micro_batches(0, engine.dims, case), EDGES)
    return found


def from_logits() -> dict[str, list[tuple[float, int]]]:
    """Cross entropy of the same weights by position, from the model's logits, of whole sequences and documents."""
    with engine_of(Case()) as engine:
        return {
            "whole": _from_logits(engine, [global_batch(0)]),
            "packed": _from_logits(engine, packed_documents_alone(0)),
        }


def _from_logits(engine: MegatronEngine, batches: list[Batch]) -> list[tuple[float, int]]:
    sums = [(0.0, 0) for _ in EDGES]
    for batch in batches:
        with torch.no_grad():
            logits = engine.model(batch.tokens, None, None).double()
        losses = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")  # [b, s]
        for bucket, (start, end) in enumerate(zip((0, *EDGES), EDGES, strict=False)):
            mask = batch.loss_mask[:, start:end]
            total, tokens = sums[bucket]
            sums[bucket] = total + losses[:, start:end][mask].sum().item(), tokens + int(mask.sum())
    return sums


def trainings(cases: dict[str, Case]) -> dict[str, list[dict[str, Any]]]:
    """Training without and with evaluations between the steps, by case."""
    return {name: [_training(case, evaluate=evaluate) for evaluate in (False, True)] for name, case in cases.items()}


def _training(case: Case, *, evaluate: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    steps = []
    with engine_of(case) as engine:
        for step in range(3):
            engine.telemetry.record_routing = True
            if evaluate:
                engine.evaluate(micro_batches(7, engine.dims, case), EDGES)
            assert engine.telemetry.record_routing
            steps.append(engine.train_step(micro_batches(step, engine.dims, case)))
            density = [layer.density for layer in engine.telemetry.routing_statistics()]
            gradients = [parameter.main_grad.clone() for parameter in engine.model.parameters()]
            if evaluate:
                engine.evaluate(micro_batches(8, engine.dims, case), EDGES)
                for parameter, gradient in zip(engine.model.parameters(), gradients, strict=True):
                    assert torch.equal(parameter.main_grad, gradient)
                attentions = [module for module in engine.model.modules() if isinstance(module, DashAttention)]
                assert not any(one.memory is not None and one.memory._passes for one in attentions)
        return {
            "steps": steps,
            "density": density,
            "weights": [parameter.detach().clone() for parameter in engine.model.parameters()],
            "random": torch.get_rng_state(),
        }

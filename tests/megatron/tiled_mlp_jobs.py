"""What the ranks of the tests of the tiled MLP do.

The test process itself does not import this: it would load Megatron-core.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dash_dist.config.trainable import TrainableSection
from dash_dist.megatron.weights import global_name
from tests.megatron.megatron_jobs import engine_of, micro_batches
from tests.support.models import Case


def gradients_of(case: Case, trainable: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of the trained parameters in one step."""
    with engine_of(case, trainable=TrainableSection.model_validate(trainable)) as engine:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in engine.model.named_parameters():
            if name.endswith(".b"):  # of an adapter: with zeros, its A would get no gradient
                parameter.data.normal_(0.0, 0.1, generator=generator)
        engine.train_step(micro_batches(0, engine.dims, case))
        return {
            global_name(engine.model, name): parameter.main_grad.clone()
            for name, parameter in engine.model.named_parameters()
            if parameter.requires_grad
        }


def mlp_calls(case: Case) -> tuple[list[int], int]:
    """Tokens of each call of the first layer's MLP in a step, and calls of the hooks on its first weight's gradient."""
    with engine_of(case) as engine:
        first = engine.model.decoder.layers[0].mlp.linear_fc1
        assert isinstance(first, nn.Module)
        tokens: list[int] = []
        handed_on: list[int] = []
        first.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[0] * inputs[0].shape[1]))
        first.weight.register_post_accumulate_grad_hook(lambda _: handed_on.append(1))
        engine.train_step(micro_batches(0, engine.dims, case))
        return tokens, len(handed_on)


def kept_bytes(case: Case) -> int:
    """Bytes of distinct tensors, but for weights, that autograd keeps of a forward pass."""
    with engine_of(case) as engine:
        weights = {weight.untyped_storage().data_ptr() for weight in engine.model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        (batch, *_) = micro_batches(0, engine.dims, case)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.model(batch.tokens, None, None, labels=batch.labels)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

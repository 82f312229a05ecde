"""Parameters of one pipeline stage that are trained, and those that are frozen.

Knows the section `trainable` and how Megatron-core treats a frozen weight. Does not know optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dash_dist.config.trainable import ADAPTERS, TrainableSection
from dash_dist.megatron.model import DashGPTModel
from dash_dist.megatron.weights import global_name

LearningRates = dict[nn.Parameter, float]
"""Learning rates of parameters that do not follow `optimizer.lr`."""


def select_parameters(model: DashGPTModel, trainable: TrainableSection, names: Iterable[str]) -> LearningRates:
    """Freeze the parameters of this stage that no pattern names, before the model is wrapped.

    Megatron-core's linears compute no weight gradient for a frozen weight, and pass the gradient of their input on.

    Args:
        names: of every parameter of the whole model, adapters excluded.

    Returns:
        The learning rates of this stage's parameters that have their own.

    Raises:
        ValueError: at every rank: a pattern decides on no parameter, or a bias trains without its weight.
    """
    rates = trainable.learning_rates(names)
    for name in rates:
        if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in rates:
            # LinearWithFrozenWeight gives a bias no gradient.
            raise ValueError(
                f"trainable.parameters: {name} would train without its weight, and gets no gradient then: add "
                f"{name.removesuffix('bias')}weight, or leave the bias out"
            )
    own: LearningRates = {}
    for local_name, parameter in model.named_parameters():
        name = global_name(model, local_name)
        adapter = trainable.lora is not None and ADAPTERS in name
        parameter.requires_grad_(adapter or name in rates)
        rate = trainable.lora.lr if trainable.lora is not None and adapter else rates.get(name)
        if rate is not None:
            own[parameter] = rate
    return own


def let_recomputed_layers_train(model: DashGPTModel) -> None:
    """Give a decoder with recomputed parts an input that requires a gradient.

    Megatron-core's recomputation has a backward pass only if the part's input requires a gradient, which the output of
    a frozen embedding does not: the parameters inside would get none.
    """
    if model.config.recomputes and model.pre_process and not model.embedding.word_embeddings.weight.requires_grad:
        model.embedding.register_forward_hook(_require_gradient)


def _require_gradient(_module: nn.Module, _inputs: tuple[Any, ...], hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.requires_grad_() if torch.is_grad_enabled() else hidden_states

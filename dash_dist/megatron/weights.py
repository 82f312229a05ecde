"""Initial weights, drawn or read, that do not depend on the parallel layout.

Knows how Megatron-core slices each weight over tensor parallelism and names it within a pipeline stage.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Set as AbstractSet
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn


def initialise_weights(model: GPTModel, *, init_std: float, seed: int, only: AbstractSet[str] | None = None) -> None:
    """Draw every matrix of this rank's part of the model from N(0, init_std^2), in place.

    Each weight is drawn in full from a generator seeded with `seed` and its name in the whole model, then cut
    to this rank's slice: the same seed gives the same model at any tensor- and pipeline-parallel size, on one
    kind of device. The two projections into the residual stream have std init_std / sqrt(2 num_layers). Norm
    weights (ones) and `summary_query` (zeros) stay as their modules made them.

    Args:
        model: one pipeline stage, before it is wrapped.
        init_std: standard deviation of the other weights.
        seed: of the run.
        only: draw these parameters alone, by their `global_name`.
    """
    tp_group = model.tp_group
    for local_name, parameter in model.named_parameters():
        name = global_name(model, local_name)
        if parameter.dim() == 1 or name.endswith("summary_query") or (only is not None and name not in only):
            continue
        std = init_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * model.config.num_layers)
        generator = generator_for(seed, name, parameter.device)
        shape = list(parameter.shape)
        shape[tensor_parallel_dim(parameter)] *= tp_group.size()
        full = torch.empty(shape, device=parameter.device).normal_(0.0, std, generator=generator)
        with torch.no_grad():
            parameter.copy_(tensor_parallel_slice(full, name, parameter, tp_group.rank(), tp_group.size()))


def generator_for(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the random numbers of one parameter, which depend on the run's seed and its name in the whole model."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


class FullParameters(Protocol):
    """A source of whole parameters."""

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return one parameter of the whole model by its `global_name`; None for zeros."""


def read_weights(model: GPTModel, source: FullParameters, *, without: AbstractSet[str] = frozenset()) -> None:
    """Fill this rank's part of the model from whole parameters, in place, holding one of them at a time.

    Args:
        model: one pipeline stage, before it is wrapped.
        without: parameters that the source does not know, which stay as they are.

    Raises:
        OSError, ValueError: the source cannot give a parameter.
    """
    tp_group = model.tp_group
    for local_name, parameter in model.named_parameters():
        name = global_name(model, local_name)
        if name in without:
            continue
        full = source.parameter(name)
        with torch.no_grad():
            if full is None:
                parameter.zero_()
                continue
            if getattr(parameter, "tensor_model_parallel", False):
                full = tensor_parallel_slice(full, name, parameter, tp_group.rank(), tp_group.size())
            if full.shape != parameter.shape:
                raise ValueError(f"{name} is {list(full.shape)} where the model has {list(parameter.shape)}")
            parameter.copy_(full)


def global_name(model: GPTModel, local_name: str) -> str:
    """A parameter's name in the whole model, from its name in this pipeline stage.

    Layers count from the first stage's first; the last stage's copy of tied embeddings has the embedding's name.
    """
    if local_name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    first_layer = model.decoder.layers[0].layer_number - 1
    return re.sub(
        r"^decoder\.layers\.(\d+)\.",
        lambda match: f"decoder.layers.{first_layer + int(match[1])}.",
        local_name,
    )


def tensor_parallel_dim(parameter: nn.Parameter) -> int:
    """The dimension along which a weight is cut over tensor parallelism."""
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def tensor_parallel_slice(
    full: torch.Tensor, name: str, parameter: nn.Parameter, tp_rank: int, tp_size: int
) -> torch.Tensor:
    """One rank's slice of a full weight.

    SwiGLU's first weight holds the gate's rows above the up projection's, and every rank holds a slice of both.
    """
    halves = full.chunk(2) if name.endswith("linear_fc1.weight") else (full,)
    dim = tensor_parallel_dim(parameter)
    return torch.cat([half.chunk(tp_size, dim)[tp_rank] for half in halves])

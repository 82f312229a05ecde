"""Interfaces through which the shared parts of an engine see ranks and models.

Knows sizes and indices. Does not know process groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from dash_dist.context_parallel import DashAttention, WindowAttention


class Dims(Protocol):
    """This rank's place in tensor (tp), context (cp), pipeline (pp) and data (dp) parallelism."""

    @property
    def device(self) -> torch.device: ...
    @property
    def world_size(self) -> int: ...
    @property
    def tp_rank(self) -> int: ...
    @property
    def pp_rank(self) -> int: ...
    @property
    def pp_size(self) -> int: ...
    @property
    def cp_size(self) -> int: ...
    @property
    def cp_rank(self) -> int: ...
    @property
    def dp_size(self) -> int: ...
    @property
    def dp_rank(self) -> int: ...


class RoutedModel(Protocol):
    """A pipeline stage; `config.num_layers` counts the layers of the whole model."""

    @property
    def config(self) -> Any: ...

    def attentions(self) -> Iterator[tuple[int, DashAttention | WindowAttention]]:
        """Yield the attention of each layer of this stage, with the layer's index from 0 in the model."""
        ...


def routed_attentions(model: RoutedModel) -> Iterator[tuple[int, DashAttention]]:
    """Yield the attentions of the stage that select chunks, with their layers."""
    for layer, attention in model.attentions():
        if isinstance(attention, DashAttention) and not attention.dense:
            yield layer, attention

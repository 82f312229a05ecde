"""The map of a layer's routing: which stretches of the sequence its queries selected, over all ranks.

Knows layers and the reduction over ranks. Does not know images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dash_dist.context_parallel import DashAttention
from dash_dist.context_parallel.shard_selections import shard_selections
from dash_dist.engine.ranks import Dims
from dash_dist.engine.step_timer import StepTimer

MAX_BINS = 256
"""Of queries and of keys: a map of a million tokens is no larger than one of 16384."""


@dataclass(frozen=True)
class SelectionMap:
    """Heat map of one layer in the last micro-batch of the last step, summed over KV heads and all ranks.

    Attributes:
        layer: counts from 0 at the first layer of the model.
        selected: int64 [bins, bins], CPU: (token, KV head, key chunk) triples that were selected, of queries in one
            stretch of the sequence and key chunks in another. The sequence's chunks fall evenly into the bins.
        available: int64 [bins, bins], CPU: all triples that were causally available; 0 above the diagonal.
    """

    layer: int
    selected: torch.Tensor
    available: torch.Tensor

    @property
    def share(self) -> torch.Tensor:
        """float64 [bins, bins]: selected / available; NaN where nothing was available."""
        return self.selected.double() / self.available  # 0 / 0 is NaN


class SelectionRecorder:
    """Counts, in the forward passes of some layers, which chunks were selected.

    Args:
        attentions: layer -> its attention, of this rank.
        timer: the time it takes is its span "heat_map".
    """

    def __init__(self, attentions: Mapping[int, DashAttention], timer: StepTimer) -> None:
        self._attentions = attentions
        self._timer = timer
        self._hooks: list[Any] = []
        self._layers: tuple[int, ...] = ()
        self.counts: dict[int, torch.Tensor] = {}
        """Layer -> `selection_counts` of this rank's tokens in its last forward pass."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the model that are recorded, whichever rank holds them. Set it to the same layers at every rank."""
        return self._layers

    @layers.setter
    def layers(self, layers: Sequence[int]) -> None:
        for hook in self._hooks:
            hook.remove()
        self.counts.clear()
        self._layers = tuple(layers)
        self._hooks = [
            self._attentions[layer].register_forward_hook(self._hook_of(layer), with_kwargs=True)
            for layer in self._layers
            if layer in self._attentions
        ]

    def _hook_of(self, layer: int) -> Any:
        def count(attention: DashAttention, inputs: tuple[torch.Tensor, ...], options: dict[str, Any], _: Any) -> None:
            if attention.memory is not None and torch.is_grad_enabled():
                return  # a recomputation: the pass before it was counted
            q, k = inputs[:2]
            with self._timer.span("heat_map"):
                self.counts[layer] = shard_selections(
                    attention, q, k, options.get("chunks"), bins=MAX_BINS, branches=options.get("branches")
                )

        return count


def gather_selections(recorder: SelectionRecorder, dims: Dims, *, num_chunks: int) -> list[SelectionMap]:
    """The maps of the recorded layers, at every rank. A collective: all ranks call it.

    One all-reduce of 2 x bins x bins integers per layer (1 MiB at the most), whatever the length of the sequence.

    Args:
        num_chunks: chunks of a whole sequence, an unfinished last one counted.

    Raises:
        RuntimeError: at every rank, where a layer was not recorded.
    """
    bins = min(MAX_BINS, num_chunks)
    totals = torch.zeros(len(recorder.layers), 2, bins, bins, dtype=torch.int64, device=dims.device)
    for row, layer in zip(totals, recorder.layers, strict=True):
        if layer in recorder.counts:
            row += recorder.counts[layer]
    dist.all_reduce(totals)
    maps = [
        SelectionMap(layer, selected=selected, available=available)
        for layer, (selected, available) in zip(recorder.layers, totals.cpu(), strict=True)
    ]
    missing = [found.layer for found in maps if not found.available.any()]
    if missing:
        raise RuntimeError(
            f"layers {missing} were not recorded: set record_selections before the step you want them of"
        )
    return maps

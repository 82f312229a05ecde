"""Which share of the chunks each layer selects, over all ranks.

Knows the layers of a pipeline stage and the reduction over ranks. Does not know loggers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dash_dist.engine.ranks import Dims, RoutedModel, routed_attentions


@dataclass(frozen=True)
class LayerRouting:
    """Selections of one layer in the last micro-batch of the last step.

    Attributes:
        layer: counts from 0 at the first layer of the model.
        density: selected / causally available chunks, the own chunk counted on both sides, over all tokens,
            KV heads and data-parallel ranks.
        selected: [chunks + 1] int64; entry k is the number of (token, KV head) pairs that selected k chunks.
    """

    layer: int
    density: float
    selected: torch.Tensor


def set_recording(model: RoutedModel, record: bool) -> None:
    """Keep, or stop keeping, each layer's routing of the last forward pass."""
    for _, attention in routed_attentions(model):
        attention.record_routing = record


def gather_routing(model: RoutedModel, dims: Dims, *, num_chunks: int) -> list[LayerRouting]:
    """Every layer's routing, summed over tensor, context and data parallelism. A collective: all ranks call it.

    Args:
        num_chunks: chunks of a whole sequence, an unfinished last one counted.

    Returns:
        The layers of the model that select chunks, in order, at every rank.

    Raises:
        RuntimeError: at every rank, where one of them has recorded nothing.
    """
    num_layers = model.config.num_layers
    available_column, missing_column = num_chunks + 1, num_chunks + 2
    counts = torch.zeros(num_layers, num_chunks + 3, dtype=torch.int64, device=dims.device)
    for layer, attention in routed_attentions(model):
        routing, row = attention.routing, counts[layer]
        if routing is None:
            row[missing_column] = 1
            continue
        selected = routing.selected_per_token  # [b, s, kv_heads]
        row[:available_column] = torch.bincount(selected.flatten().long(), minlength=num_chunks + 1)
        pairs_per_token = selected.shape[0] * selected.shape[2]
        row[available_column] = routing.available_per_token.long().sum() * pairs_per_token
    dist.all_reduce(counts)  # other stages' layers are zero here, and so are layers without routing
    counts = counts.cpu()
    if counts[:, missing_column].any():
        raise RuntimeError(
            "no routing was recorded: set record_routing = True at every rank before the step you want it of"
        )
    numbers = torch.arange(num_chunks + 1)
    return [
        LayerRouting(
            layer=index,
            density=float((row[:available_column] * numbers).sum() / row[available_column]),
            selected=row[:available_column].clone(),
        )
        for index, row in enumerate(counts)
        if row[available_column] > 0
    ]

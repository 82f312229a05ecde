"""Traffic of context parallelism in a step, over all layers and ranks.

Knows the layers of a pipeline stage and the reduction over ranks. Does not know how K and V travel, nor loggers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dash_dist.context_parallel.exchange import EXCHANGES
from dash_dist.context_parallel.layout import imbalance_by_layout, shard_positions
from dash_dist.engine.ranks import Dims, RoutedModel

_TRAVELLING = tuple(name for name in EXCHANGES if name != "auto")


@dataclass(frozen=True)
class ExchangeStatistics:
    """One step, the same at every rank: sums over all micro-batches, layers and ranks, forward and backward.

    Attributes:
        planned_bytes: K, V and their gradients that the plans had the ranks send; of exchanges without a plan, what
            they send.
        sent_bytes: what the ranks did send to each other.
        slow_link_bytes: the part of it that crossed the links between nodes.
        dense_bytes: what an all-gather would have sent; the ring sends more.
        coverage: layer, from 0 -> blocks of other ranks that were needed / that could have been; of layers that had a
            plan.
        overlap: share of the time under way during which the ranks had something to compute; None where nothing
            travelled.
        imbalance: layout -> selected chunks of the busiest context-parallel rank / of the mean one, 1 without routing;
            what the layout would have given for those that are not in use, left out where their pieces are not whole
            chunks.
        exchanges: exchange -> share of the forward passes, over all of `EXCHANGES` but "auto"; of layers with
            windows, which have a halo instead, none counts.
    """

    planned_bytes: int
    sent_bytes: int
    slow_link_bytes: int
    dense_bytes: int
    coverage: Mapping[int, float]
    overlap: float | None
    imbalance: Mapping[str, float]
    exchanges: Mapping[str, float]


def gather_traffic(model: RoutedModel, dims: Dims, *, num_chunks: int, layout: str) -> ExchangeStatistics:
    """Takes every layer's traffic and adds it up over all ranks. A collective: all ranks call it.

    One all-reduce of num_chunks + 2 x layers + 10 integers, whatever the number of ranks.

    Args:
        num_chunks: chunks of a whole sequence.
        layout: the one in use.

    Raises:
        RuntimeError: at every rank, where no layer has counted anything since the last call.
    """
    totals = torch.zeros(7 + len(_TRAVELLING), dtype=torch.int64)
    blocks = torch.zeros(model.config.num_layers, 2, dtype=torch.int64)  # other stages' layers stay zero
    work = torch.zeros(num_chunks, dtype=torch.int64)
    own_chunks = shard_positions(num_chunks, dims.cp_rank, dims.cp_size, layout)  # chunks are dealt out as tokens are
    for layer, attention in model.attentions():
        traffic = attention.traffic.take()
        totals += torch.tensor(
            [
                traffic.planned_bytes,
                traffic.sent_bytes,
                traffic.slow_link_bytes,
                traffic.dense_bytes,
                round(traffic.transfer_seconds * 1e9),  # integers, to travel with the others
                round(traffic.waited_seconds * 1e9),
                *(traffic.exchanges.get(name, 0) for name in (*_TRAVELLING, "halo")),
            ]
        )
        blocks[layer] = torch.tensor([traffic.needed_blocks, traffic.reachable_blocks])
        if len(traffic.work):
            work[own_chunks] += traffic.work
    counts = torch.cat((totals, blocks.flatten(), work)).to(dims.device)
    dist.all_reduce(counts)
    totals, blocks, work = counts.cpu().split([len(totals), blocks.numel(), num_chunks])
    planned, sent, slow, dense, flight, waited, *calls, halos = totals.tolist()
    if not any(calls) and not halos:
        raise RuntimeError("no exchange was counted: ask once after each step whose exchange statistics you want")
    return ExchangeStatistics(
        planned_bytes=planned,
        sent_bytes=sent,
        slow_link_bytes=slow,
        dense_bytes=dense,
        coverage={
            layer: needed / reachable
            for layer, (needed, reachable) in enumerate(blocks.view(-1, 2).tolist())
            if reachable
        },
        overlap=max(0.0, 1.0 - waited / flight) if flight else None,
        imbalance=imbalance_by_layout(work, dims.cp_size),
        exchanges={name: count / max(sum(calls), 1) for name, count in zip(_TRAVELLING, calls, strict=True)},
    )

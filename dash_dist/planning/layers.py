"""Layers of a model by their kind of attention: seconds on an H200, exchange, and how evenly ranks share the work.

Knows kinds and pipeline stages. Does not know how parts of a step overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from dash_dist.config.attention import PIECES_PER_RANK, AttentionConfig, Kind
from dash_dist.config.run import RunConfig
from dash_dist.config.selection import ROUTED_KINDS
from dash_dist.planning.activations import summary_vectors
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.attention_time import AttentionTime, attention_time, window_time, with_first_chunks
from dash_dist.planning.hardware import Machine
from dash_dist.planning.layouts import Layout, Sizes
from dash_dist.planning.recompute import Recompute
from dash_dist.planning.step import imbalance
from dash_dist.planning.traffic import NO_EXCHANGE, ExchangePlan, plan_exchange, plan_halo
from dash_kernels.selection import STRIDE

Layer = TypeVar("Layer")


@dataclass(frozen=True)
class LayerPlan:
    """Attention of one layer and micro-batch.

    Attributes:
        time: on an H200, of the mean rank.
        uneven: attention of the busiest context-parallel rank / of the mean one.
        attended: tokens that a token attends to, on average.
        routed: chunks that a token is routed against, on average.
    """

    kind: Kind
    time: AttentionTime
    exchange: ExchangePlan
    uneven: float
    attended: float
    routed: float


def plan_layers(
    config: RunConfig, sizes: Sizes, layout: Layout, machine: Machine, assumptions: Assumptions
) -> tuple[LayerPlan, ...]:
    """Plan every layer of the model; those of one kind are equal.

    Dense layers count as dash layers that select every chunk, whose kernels they take under context parallelism, and
    topk, infllmv2 and nsa layers as dash layers of the density that follows from attention.top_chunks.
    """
    attention, length = config.attention, config.training.sequence_length
    kinds = attention.kinds(config.model.num_layers)

    def routed(kind: Kind, assumed: Assumptions) -> LayerPlan:
        return LayerPlan(
            kind=kind,
            time=attention_time(sizes, assumed, sequence_length=length),
            exchange=plan_exchange(sizes, layout, machine, assumed, summary_vectors(sizes, kind)),
            uneven=imbalance(attention.layout, layout.context),
            attended=assumed.density * sizes.chunks_per_token * sizes.chunk_size,
            routed=sizes.chunks_per_token,
        )

    def of(kind: Kind) -> LayerPlan:
        match kind:
            case "dash":
                plan = routed(kind, assumptions)
                if not sizes.attend_first_chunk:
                    return plan
                return replace(plan, time=with_first_chunks(plan.time, sizes))
            case "nsa":
                assumed = replace(assumptions, density=attention.fixed_density(kind, sizes.document))
                return _with_branches(routed(kind, assumed), attention, sizes, layout, machine)
            case "topk" | "infllmv2":
                return routed(kind, replace(assumptions, density=attention.fixed_density(kind, sizes.document)))
            case "dense":
                return routed(kind, replace(assumptions, density=1.0, coverage=1.0))
            case "window":
                return _window(attention, sizes, layout, machine)

    by_kind = {kind: of(kind) for kind in dict.fromkeys(kinds)}
    return tuple(by_kind[kind] for kind in kinds)


def _window(attention: AttentionConfig, sizes: Sizes, layout: Layout, machine: Machine) -> LayerPlan:
    assert attention.window is not None  # the configuration has checked it
    attended, exchange = _of_window(attention.window, attention, sizes, layout, machine)
    time = window_time(sizes, attended)
    return LayerPlan("window", time, exchange, uneven=1.0, attended=attended, routed=0.0)


def _of_window(
    window: int, attention: AttentionConfig, sizes: Sizes, layout: Layout, machine: Machine
) -> tuple[float, ExchangePlan]:
    """Tokens that a token attends to on average, and the exchange of the halo."""
    reached = min(window, sizes.document)
    attended = reached - reached**2 / (2 * sizes.document)
    if layout.context == 1:
        return attended, NO_EXCHANGE
    chunks = -(-(window - 1) // sizes.chunk_size)
    return attended, plan_halo(sizes, layout, machine, chunks * PIECES_PER_RANK[attention.layout])


def _with_branches(
    selected: LayerPlan, attention: AttentionConfig, sizes: Sizes, layout: Layout, machine: Machine
) -> LayerPlan:
    """A layer of NSA from its selected branch: the compressed one as a window of as many blocks, and a window.

    A rank sends the halo of its windows, and 16 tokens at the end of each piece. Compressed keys and values are
    gathered, and their float32 gradients are reduced, twice the bytes.
    """
    attended, halo = _of_window(attention.nsa_rule.window, attention, sizes, layout, machine)
    blocks = sizes.document / (2 * STRIDE)
    compressed, windows = window_time(sizes, blocks), window_time(sizes, attended)
    time = AttentionTime(
        route=selected.time.route,
        attend=selected.time.attend + compressed.attend + windows.attend,
        backward=selected.time.backward + compressed.backward + windows.backward,
    )
    exchange = selected.exchange
    if layout.context > 1:
        overlap = plan_halo(sizes, layout, machine, PIECES_PER_RANK[attention.layout])
        share = STRIDE / sizes.chunk_size
        exchange = replace(
            exchange,
            forward=exchange.forward + halo.forward + overlap.forward * share,
            backward=exchange.backward + halo.backward + overlap.backward * share,
            summary_gradients=exchange.summaries * 2,
            messages=exchange.messages + halo.messages + overlap.messages,
        )
    return replace(selected, time=time, exchange=exchange, attended=selected.attended + blocks + attended)


def of_stage(layers: tuple[LayerPlan, ...], layout: Layout, stage: int) -> tuple[LayerPlan, ...]:
    """Layers of pipeline stage `stage`, from 0."""
    count = len(layers) // layout.pipeline
    return layers[stage * count : (stage + 1) * count]


def by_recomputation(layers: Sequence[Layer], layout: Layout) -> list[tuple[Layout, Sequence[Layer]]]:
    """Split a stage's layers into those that are recomputed and those that are not, either with its own layout."""
    recompute = layout.recompute
    first = len(layers) if recompute.layers is None else recompute.layers
    parts = (
        (replace(layout, recompute=recompute.of_layers(None)), layers[:first]),
        (replace(layout, recompute=Recompute()), layers[first:]),
    )
    return [(one, of_one) for one, of_one in parts if of_one]


def foremost(layers: tuple[LayerPlan, ...]) -> LayerPlan:
    """The layer that a report shows: one that selects chunks if there is any, else of kind dense, or of windows."""
    return min(layers, key=lambda layer: (*ROUTED_KINDS, "dense", "window").index(layer.kind))

"""One layer of a trained model: what it selects, and the time of the kernels on it beside dense attention.

Knows the columns of the kernel benchmark; does not know how the inputs came about.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from dash_kernels.backend import select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.triton import links
from tools.benchmarks.common.inputs import DTYPES, Case
from tools.benchmarks.kernels.columns import DENSE, Stages, dash, dense, forward, forward_backward
from tools.benchmarks.kernels.measure import kernel_times, measure
from tools.benchmarks.trained.capture import Layer

WAYS = {"tiles": 0.0, "links": math.inf}
"""Tile efficiency up to which the stages go by links."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
_SLOWEST = 12


def case_of(layer: Layer) -> Case:
    """Describe a layer's inputs as a case of the kernel benchmark; its density is measured, not asked for."""
    q, k = layer.inputs.q, layer.inputs.k
    dtype = next(name for name, one in DTYPES.items() if one == q.dtype)
    return Case(
        seq_len=q.shape[1],
        query_heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        chunk_size=layer.spec.chunk_size,
        dtype=dtype,
        inputs="trained",
        asked_density=1.0,
        prior_sigma=layer.spec.prior_sigma,
    )


def selection(layer: Layer) -> dict[str, Any]:
    """Return the density, and quantiles of the chunks that the tokens of the sequence's second half select."""
    case, inputs = case_of(layer), layer.inputs
    spec = layer.spec.for_head_dim(case.head_dim)
    backend = select_backend("auto", inputs.q, case.kv_heads, spec)
    grid = ChunkGrid.whole_sequence(case.seq_len, case.chunk_size)
    summaries = backend.summarize(inputs.k, grid, inputs.summary_query, spec)
    selected = backend.route(inputs.q, grid, summaries, spec).selected  # per token and KV head
    late = selected.reshape(1, case.seq_len, -1)[:, case.seq_len // 2 :].flatten().float()
    sample = late[:: max(1, len(late) // 100_000)]  # torch.quantile takes no more than 2^24 numbers
    return {
        "density": int(selected.sum(dtype=torch.int64)) / case.available,
        "chunks": {str(q): float(sample.quantile(q)) for q in QUANTILES},
        "summary_query_norm": float(inputs.summary_query.float().norm(dim=-1).mean()),
    }


def times(layer: Layer) -> dict[str, Any]:
    """Return milliseconds on a GPU: forward, forward and backward, by stage and by kernel, and dense attention's.

    Each is measured with the stages by tiles and by links, whose results are compared.
    """
    case, inputs = case_of(layer), layer.inputs
    cudnn = dense(DENSE["cuDNN"])
    of_cudnn = {
        "forward": measure(forward(cudnn, inputs)).median_ms,
        "forward_backward": measure(forward_backward(cudnn, inputs)).median_ms,
    }
    results = {name: _results(layer, name) for name in WAYS}
    differences = [
        float((found.float() - wanted.float()).norm() / wanted.float().norm())
        for found, wanted in zip(results["links"], results["tiles"], strict=True)
    ]
    return {
        "cudnn": of_cudnn,
        "ways": {name: _times_of_way(layer, name) for name in WAYS},
        "difference": max(differences),
        "tile_efficiency": Stages(case, inputs).tile_efficiency(layer.spec.routing_scale),
    }


def _results(layer: Layer, name: str) -> Sequence[torch.Tensor]:
    case = case_of(layer)
    with _way(name):
        return forward_backward(dash(case, layer.spec.routing_scale, case.prior_sigma), layer.inputs)()


def _times_of_way(layer: Layer, name: str) -> dict[str, Any]:
    case, scale, inputs = case_of(layer), layer.spec.routing_scale, layer.inputs
    ours = dash(case, scale, case.prior_sigma)
    with _way(name):
        split = Stages(case, inputs).split(scale, forward_only=False)
        return {
            "forward": measure(forward(ours, inputs)).median_ms,
            "forward_backward": measure(forward_backward(ours, inputs)).median_ms,
            "stages": {stage: cell.median_ms for stage, cell in split.items()},
            "kernels": dict(list(kernel_times(forward_backward(ours, inputs)).items())[:_SLOWEST]),
        }


def _way(name: str) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.multiple(links, LEAST_EFFICIENCY=WAYS[name], LEAST_TOKENS=0)

"""One layer of a trained model: what it selects, and the time of the kernels on it beside dense attention.

Knows the columns of the kernel benchmark; does not know how the inputs came about.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from dash_kernels.attention import dash_attention
from dash_kernels.backend import select_backend
from dash_kernels.chunks import ChunkGrid
from tools.benchmarks.common.inputs import DTYPES, Case, Inputs
from tools.benchmarks.kernels.columns import DENSE, Stages, dash, dense, forward, forward_backward
from tools.benchmarks.kernels.measure import kernel_times, measure
from tools.benchmarks.trained.capture import Layer

QUANTILES = (0.1, 0.5, 0.9, 0.99)
_SLOWEST = 12
_CHECKED = 4096  # tokens; float64 needs all their scores at a time


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


def errors(layer: Layer, tokens: int = _CHECKED) -> dict[str, float]:
    """Return how far output and gradients are from those in float64, of the sequence's first tokens, by their norms.

    The first tokens of a causal sequence are a sequence.
    """
    inputs = layer.inputs
    of_tokens = {name: getattr(inputs, name)[:, :tokens] for name in ("q", "k", "v", "grad")}
    first = dataclasses.replace(inputs, **of_tokens)
    wide = Inputs(**{name: tensor.double() for name, tensor in vars(first).items()})
    found = forward_backward(functools.partial(dash_attention, spec=layer.spec), first)()
    wanted = forward_backward(functools.partial(dash_attention, spec=layer.spec, backend="eager"), wide)()
    return {
        name: float((one.double() - exact).norm() / exact.norm())
        for name, one, exact in zip(("output", "q", "k", "v", "summary_query"), found, wanted, strict=True)
    }


def times(layer: Layer) -> dict[str, Any]:
    """Return milliseconds on a GPU: forward, forward and backward, by stage and by kernel, and dense attention's.

    `host` is the time until a call of forward and backward returns to Python.
    """
    case, scale, inputs = case_of(layer), layer.spec.routing_scale, layer.inputs
    ours, cudnn = dash(case, scale, case.prior_sigma), dense(DENSE["cuDNN"])
    stages = Stages(case, inputs)
    both = measure(forward_backward(ours, inputs))
    return {
        "cudnn": {
            "forward": measure(forward(cudnn, inputs)).median_ms,
            "forward_backward": measure(forward_backward(cudnn, inputs)).median_ms,
        },
        "forward": measure(forward(ours, inputs)).median_ms,
        "forward_backward": both.median_ms,
        "host": both.host_ms,
        "stages": {stage: cell.median_ms for stage, cell in stages.split(scale, forward_only=False).items()},
        "kernels": dict(list(kernel_times(forward_backward(ours, inputs)).items())[:_SLOWEST]),
        "tile_efficiency": stages.tile_efficiency(scale),
    }

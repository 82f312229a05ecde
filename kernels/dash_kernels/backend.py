"""Choice of the backend that computes a call.

Both backends offer the same functions (documented in `eager.py`); every caller, on one device or many, composes them.
Knows the backends and the support table; does not know their kernels.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Protocol

import torch

from dash_kernels import eager
from dash_kernels.chunks import ChunkGrid
from dash_kernels.device import Device
from dash_kernels.first_chunk import FirstChunkStages
from dash_kernels.limits import MAX_TRITON_SHARPNESS
from dash_kernels.ranges import with_ranges
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries, QueryGradient, Routing
from dash_kernels.support import obstacle

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "eager")


class Backend(Protocol):
    """The stages; see `dash_kernels.eager` for shapes and dtypes."""

    def summarize(
        self, k: torch.Tensor, chunks: ChunkGrid, summary_query: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor: ...

    def route(
        self, q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec
    ) -> Routing: ...

    def mark_one(
        self,
        q: torch.Tensor,
        query_chunks: ChunkGrid,
        chosen: torch.Tensor,
        summaries: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor: ...

    def reached(self, routing: Routing, query_chunks: ChunkGrid, n: int, spec: AttentionSpec) -> torch.Tensor: ...

    def attend(
        self,
        queries: Queries,
        part: Part | Blocks,
        spec: AttentionSpec,
        *,
        before: tuple[torch.Tensor, torch.Tensor] | None,
        last: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def row_dots(self, grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor: ...

    def query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> QueryGradient: ...

    def finish_query_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        part: Part | Blocks,
        spec: AttentionSpec,
        before: QueryGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def key_gradient(
        self,
        queries: Queries,
        upstream: OutputGradient,
        ratio: torch.Tensor,
        part: Part | Blocks,
        summary_query: torch.Tensor,
        spec: AttentionSpec,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def select_backend(name: str, q: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> Backend:
    """Select the backend of a call. "auto" takes Triton on a GPU where it can, and logs once where it cannot.

    Raises ValueError for an unknown name, and for "triton" where Triton cannot compute the call.
    """
    stages = _select(name, q, kv_heads, spec)
    return FirstChunkStages(stages) if spec.attend_first_chunk else stages


def _select(name: str, q: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: give one of {', '.join(BACKENDS)}")
    if name == "eager" or (name == "auto" and not q.is_cuda):
        return with_ranges(eager)
    obstacle = _triton_obstacle(q, kv_heads, spec)
    if obstacle is None:
        import dash_kernels.triton

        return with_ranges(dash_kernels.triton)
    if name == "triton":
        raise ValueError(f"backend 'triton' cannot take this call: {obstacle}; use backend='eager' or 'auto'")
    _log_fallback(obstacle)
    return with_ranges(eager)


def _triton_obstacle(q: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    device = Device.of(q.device)
    if device.architecture == q.device.type:  # neither a GPU nor the interpreter
        return f"tensors are on {q.device}, which needs TRITON_INTERPRET=1 set before Triton is imported"
    query_heads, head_dim = q.shape[2:]
    unsupported = obstacle(device, q.dtype, head_dim, spec.chunk_size, query_heads // kv_heads)
    if unsupported is not None:
        return unsupported
    if spec.selection is not None:  # what follows concerns routing
        return None
    if spec.alpha != 1.5:
        return f"alpha is {spec.alpha}, the kernels take 1.5"
    sharpness = spec.routing_scale * max(1.0, spec.prior_exponent)
    if sharpness > MAX_TRITON_SHARPNESS:
        limit = f"{MAX_TRITON_SHARPNESS:g}"
        return f"routing_scale x max(1, 1 / prior_sigma) is {sharpness:g}, the kernels take up to {limit}"
    return None


@functools.cache
def _log_fallback(obstacle: str) -> None:
    logger.warning("DashAttention runs on the slower eager backend: %s", obstacle)

"""Which implementation of the stages computes a call.

Both backends offer the same functions (documented in `eager.py`), and every caller, on one device or many,
composes only these.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Protocol

import torch

from dash_kernels import eager
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries, QueryGradient, Routing

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "eager")
MAX_TRITON_HEAD_DIM = 256
# Tokens x head_dim of a chunk, rounded up to powers of two: what fits into shared memory in float32, and in 16 bits on
# GPUs with less of it than Hopper's.
SMALL_CHUNK = 64 * 128
MAX_TRITON_GROUP = 16
# The kernels round a query's scores of a chunk in two ways (see backward_keys.py), which a sharp routing magnifies.
MAX_TRITON_SHARPNESS = 200.0


class Backend(Protocol):
    """The stages; see `dash_kernels.eager` for shapes and dtypes."""

    def summarize(
        self, k: torch.Tensor, chunks: ChunkGrid, summary_query: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor: ...

    def route(
        self, q: torch.Tensor, query_chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec
    ) -> Routing: ...

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
    """The backend for a call; "auto" takes Triton on a GPU where it can and says once where it cannot.

    Raises ValueError for an unknown name, and for "triton" where Triton cannot compute the call.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: give one of {', '.join(BACKENDS)}")
    if name == "eager" or (name == "auto" and not q.is_cuda):
        return eager
    obstacle = _triton_obstacle(q, kv_heads, spec)
    if obstacle is None:
        import dash_kernels.triton_backend

        return dash_kernels.triton_backend
    if name == "triton":
        raise ValueError(f"backend 'triton' cannot take this call: {obstacle}; use backend='eager' or 'auto'")
    _log_fallback(obstacle)
    return eager


def _triton_obstacle(q: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {q.device}, which needs TRITON_INTERPRET=1 set before Triton is imported"
    if torch.version.hip is not None:
        return "the kernels are made for CUDA GPUs"
    if q.dtype == torch.float64:
        return "float64 is computed by the eager backend"
    if spec.alpha != 1.5:
        return f"alpha is {spec.alpha}, the kernels take 1.5"
    query_heads, head_dim = q.shape[2:]
    if head_dim > MAX_TRITON_HEAD_DIM:
        return f"head_dim is {head_dim}, the kernels take up to {MAX_TRITON_HEAD_DIM}"
    sharpness = spec.routing_scale * max(1.0, spec.prior_exponent)
    if sharpness > MAX_TRITON_SHARPNESS:
        limit = f"{MAX_TRITON_SHARPNESS:g}"
        return f"routing_scale x max(1, 1 / prior_sigma) is {sharpness:g}, the kernels take up to {limit}"
    if query_heads // kv_heads > MAX_TRITON_GROUP:
        return f"{query_heads // kv_heads} query heads share a KV head, the kernels take up to {MAX_TRITON_GROUP}"
    float32, hopper = q.dtype == torch.float32, is_hopper(q)
    if (float32 or not hopper) and _padded(head_dim) * max(_padded(spec.chunk_size), 64) > SMALL_CHUNK:
        return f"head_dim {head_dim} with chunk_size {spec.chunk_size} in {q.dtype} does not fit into shared memory"
    if float32 and not hopper:
        return "float32 fits into the shared memory of Hopper GPUs only"
    return None


def is_hopper(q: torch.Tensor) -> bool:
    """Whether the kernels run as on an H100; so does Triton's interpreter."""
    return not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] == 9


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.cache
def _log_fallback(obstacle: str) -> None:
    logger.warning("DashAttention runs on the slower eager backend: %s", obstacle)

"""Timed functions: this project's call and its stages, and dense attention by PyTorch's SDPA, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dash_kernels import dash_attention
from dash_kernels.backend import select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, OutputGradient, Part, Queries
from dash_kernels.triton.reached import tile_efficiency
from tools.benchmarks.common.inputs import Case, Inputs
from tools.benchmarks.kernels.measure import Cell, Function, measure

BACKEND = "triton"
# The released models' prior_sigma, with which the prior only selects; the peer is compared at this value.
PEER_SIGMA = 1e6
DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dash(case: Case, routing_scale: float, prior_sigma: float | None, *, attend_first_chunk: bool = False) -> Attention:
    """This project's attention of (q, k, v, summary_query)."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, summary_query: torch.Tensor) -> torch.Tensor:
        return dash_attention(
            q,
            k,
            v,
            summary_query,
            chunk_size=case.chunk_size,
            routing_scale=routing_scale,
            prior_sigma=prior_sigma,
            attend_first_chunk=attend_first_chunk,
            backend=BACKEND,
        )

    return attention


def dense(kernel: SDPBackend) -> Attention:
    """Causal dense attention of the same tensors by one of PyTorch's kernels; summary_query has no part in it."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel([kernel]):
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attention


def forward(attention: Attention, inputs: Inputs) -> Function:
    """The forward pass alone, without what a backward pass would keep."""

    def call() -> tuple[torch.Tensor]:
        with torch.no_grad():
            return (attention(inputs.q, inputs.k, inputs.v, inputs.summary_query),)

    return call


def forward_backward(attention: Attention, inputs: Inputs) -> Function:
    """A training step's share: the output, and the gradients of every input that has one."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.summary_query)]

    def call() -> tuple[torch.Tensor, ...]:
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, inputs.grad, allow_unused=True)  # dense: no summary_query
        return out.detach(), *(gradient for gradient in gradients if gradient is not None)

    return call


class Stages:
    """The stages of this project's call on one case's inputs, each by itself."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._backend = select_backend(BACKEND, inputs.q, inputs.k.shape[2], self._spec(1.0))
        self._grid = ChunkGrid.whole_sequence(case.seq_len, case.chunk_size)
        self._part = Part(inputs.k, inputs.v, self._grid)
        self._summaries = self._backend.summarize(inputs.k, self._grid, inputs.summary_query, self._spec(1.0))

    def selected(self, routing_scale: float) -> int:
        """(token, KV head, chunk) triples that the routing selects, the own chunks included."""
        routing = self._backend.route(self._inputs.q, self._grid, self._summaries, self._spec(routing_scale))
        return int(routing.selected.sum(dtype=torch.int64))

    def tile_efficiency(self, routing_scale: float) -> float:
        """Selected / walked (token, chunk) pairs of the forward pass."""
        spec = self._spec(routing_scale)
        routing = self._backend.route(self._inputs.q, self._grid, self._summaries, spec)
        return tile_efficiency(routing, self._grid, spec)

    def split(self, routing_scale: float, *, forward_only: bool) -> dict[str, Cell]:
        """Every stage timed on the results of the one before it."""
        backend, grid, part, spec = self._backend, self._grid, self._part, self._spec(routing_scale)
        q, k, summary_query, grad = self._inputs.q, self._inputs.k, self._inputs.summary_query, self._inputs.grad
        summaries = self._summaries

        def summarize() -> tuple[torch.Tensor]:
            return (backend.summarize(k, grid, summary_query, spec),)

        def route() -> tuple[torch.Tensor, ...]:
            return tuple(x for x in vars(backend.route(q, grid, summaries, spec)).values() if torch.is_tensor(x))

        queries = Queries(q, grid, summaries, backend.route(q, grid, summaries, spec))

        def attend() -> tuple[torch.Tensor, torch.Tensor]:
            return backend.attend(queries, part, spec, before=None, last=True)

        cells = {"summarize": measure(summarize), "route": measure(route), "attend": measure(attend)}
        if forward_only:
            return cells
        out, lse = attend()

        def upstream() -> OutputGradient:
            return OutputGradient(grad, lse, backend.row_dots(grad, out))

        def query_gradient() -> tuple[torch.Tensor, torch.Tensor]:
            return backend.finish_query_gradient(queries, upstream(), part, spec, None)

        _, ratio = query_gradient()
        of_output = upstream()

        def key_gradient() -> tuple[torch.Tensor, torch.Tensor]:
            return backend.key_gradient(queries, of_output, ratio, part, summary_query, spec)

        return cells | {"query gradient": measure(query_gradient), "key gradient": measure(key_gradient)}

    def _spec(self, routing_scale: float) -> AttentionSpec:
        return AttentionSpec(
            chunk_size=self._case.chunk_size,
            alpha=1.5,
            routing_scale=routing_scale,
            prior_sigma=self._case.prior_sigma,
        ).for_head_dim(self._case.head_dim)

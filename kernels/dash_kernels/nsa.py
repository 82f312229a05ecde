"""Native Sparse Attention on one device: three branches of attention, added up by gates.

Knows the branches and their order; does not know where projections and gates come from, nor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dash_kernels.arguments import check_tensors, sequence_chunks
from dash_kernels.attention import RoutingMemory, dash_attention
from dash_kernels.chunks import ChunkGrid
from dash_kernels.compressed_attention import compressed_attention
from dash_kernels.compression import Angles, CompressionWeights, compress, rotate_compressed, strides_of
from dash_kernels.selection import BLOCK, NSA
from dash_kernels.selection_scores import by_chunk
from dash_kernels.spec import AttentionSpec, require
from dash_kernels.window import document_segments, window_attention


@dataclass(frozen=True)
class Branches:
    """Inputs of a layer of NSA beside those of its selected branch.

    compressed_k, compressed_v: [B, T, Hkv, D] of the compressed branch, not rotated.
    window_k, window_v:         [B, T, Hkv, D] of the window branch, the keys after rotary embedding.
    gates:  [B, T, Hq, 3] factors of the compressed, the selected and the window branch.
    angles: of the tokens, by which compressed keys are rotated; None without positions.
    """

    compressed_k: torch.Tensor
    compressed_v: torch.Tensor
    window_k: torch.Tensor
    window_v: torch.Tensor
    gates: torch.Tensor
    angles: Angles | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that have gradients, in their order."""
        return self.compressed_k, self.compressed_v, self.window_k, self.window_v, self.gates


def nsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    branches: Branches,
    key_weights: CompressionWeights,
    value_weights: CompressionWeights,
    *,
    spec: AttentionSpec,
    window: int,
    cu_seqlens: torch.Tensor | None = None,
    chunks: ChunkGrid | None = None,
    backend: str = "auto",
    return_routing: bool = False,
    memory: RoutingMemory | None = None,
) -> Any:
    """Native Sparse Attention (arXiv 2502.11089), differentiable in all tensors.

    A query attends to the compressed blocks that end at or before it, to the chunks that `spec.selection` selects by
    the compressed branch's probabilities, and to the last `window` tokens. No gradient passes through the selection.

    Args:
        q: [B, T, Hq, D], after rotary embedding.
        k, v: of the selected branch, [B, T, Hkv, D], after rotary embedding.
        summary_query: [Hkv, D], not read; its gradient is zeros.
        key_weights, value_weights: of the compression.
        spec: with `selection.NSA`.
        window: tokens that a token of the window branch attends to, itself counted.
        cu_seqlens, chunks, backend, return_routing, memory: as for `dash_attention`; the routing is that of the
            selected branch.

    Returns:
        [B, T, Hq, D] in q's dtype; with return_routing the pair (output, RoutingStatistics).

    Raises:
        ValueError: a shape or setting is not allowed; the message names it.
    """
    check_nsa(q, k, v, summary_query, branches, key_weights, value_weights, spec)
    spec = spec.for_head_dim(q.shape[-1])
    grid = sequence_chunks(chunks, cu_seqlens, q, q.shape[1], spec)
    keys = compress(strides_of(branches.compressed_k, grid, spec), key_weights)
    keys = rotate_compressed(keys, branches.angles, grid, spec)
    values = compress(strides_of(branches.compressed_v, grid, spec), value_weights)
    compressed = compressed_attention(q, keys, values, grid, spec)
    selected, routing = dash_attention(
        q,
        k,
        v,
        summary_query,
        spec=spec,
        chunks=grid,
        backend=backend,
        return_routing=True,
        memory=memory,
        summaries=by_chunk(keys.detach(), spec),
    )
    windowed = window_attention(
        q,
        branches.window_k,
        branches.window_v,
        document_segments(grid),
        window=window,
        softmax_scale=spec.softmax_scale,
    )
    out = gated(branches.gates, compressed, selected, windowed)
    return (out, routing) if return_routing else out


def gated(gates: torch.Tensor, *outputs: torch.Tensor) -> torch.Tensor:
    """Sum of the branches' outputs [B, T, Hq, D], each times its gate in [B, T, Hq, branches]."""
    first, *others = (gate.unsqueeze(-1) * out for gate, out in zip(gates.unbind(-1), outputs, strict=True))
    return sum(others, first)


def check_nsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    branches: Branches,
    key_weights: CompressionWeights,
    value_weights: CompressionWeights,
    spec: AttentionSpec,
) -> None:
    """Raises ValueError for tensors outside the domain of `nsa_attention`, or a spec that selects otherwise."""
    check_tensors(q, k, v, summary_query)
    require(
        isinstance(spec.selection, NSA), f"spec.selection is {spec.selection}, and NSA selects by its own: give an NSA"
    )
    *keys_and_values, gates = branches.tensors
    for name, x in zip(("compressed_k", "compressed_v", "window_k", "window_v"), keys_and_values, strict=True):
        require(
            x.shape == k.shape and x.dtype == k.dtype and x.device == k.device,
            f"{name} is {tuple(x.shape)}, {x.dtype} on {x.device}, but k {tuple(k.shape)}, {k.dtype} on {k.device}",
        )
    require(
        gates.shape == (*q.shape[:3], 3),
        f"gates has shape {tuple(gates.shape)}: give [B, T, query heads, 3] = {(*q.shape[:3], 3)}",
    )
    _, _, kv_heads, head_dim = k.shape
    for name, (positions, inner, outer) in {"key_weights": key_weights, "value_weights": value_weights}.items():
        width = inner.shape[-1]
        shapes = (kv_heads, BLOCK, head_dim), (kv_heads, BLOCK * head_dim, width), (kv_heads, width, head_dim)
        require(
            (positions.shape, inner.shape, outer.shape) == shapes,
            f"{name} have shapes {tuple(positions.shape)}, {tuple(inner.shape)}, {tuple(outer.shape)}: give {shapes}",
        )

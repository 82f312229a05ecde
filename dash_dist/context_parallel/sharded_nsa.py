"""Native Sparse Attention of a sequence that is split over the ranks of a group.

Knows what the branches gather and what they fetch from neighbours; does not know how chunks, halos and K and V travel.
Compressed keys and values are gathered, and so known to all ranks. A block across the border of two shards is the
second one's, which fetches the 16 tokens before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from dash_dist.context_parallel.agreement import Named, check_together
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.gathered_chunks import gather_chunks
from dash_dist.context_parallel.halo import on_device, plan_halo, with_halo
from dash_dist.context_parallel.layout import check_layout
from dash_dist.context_parallel.recompute import ForwardMemory
from dash_dist.context_parallel.shard import Shard, fingerprint, whole_chunks
from dash_dist.context_parallel.sharded_attention import dash_attention
from dash_dist.context_parallel.topology import find_topology
from dash_dist.cost_model.topology import Topology
from dash_kernels import AttentionSpec, ChunkGrid
from dash_kernels.compressed_attention import compressed_attention
from dash_kernels.compression import CompressionWeights, compress, rotate_compressed
from dash_kernels.nsa import Branches, check_nsa, gated
from dash_kernels.nsa import nsa_attention as nsa_attention_one_device
from dash_kernels.selection import STRIDE
from dash_kernels.selection_scores import by_chunk
from dash_kernels.window import window_attention


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
    cp_group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    exchange: str = "auto",
    ranks_per_node: int | None = None,
    traffic: Traffic | None = None,
    memory: ForwardMemory[Any] | None = None,
) -> Any:
    """`dash_kernels.nsa.nsa_attention` of a sequence that is split over the ranks of cp_group.

    Tensors of tokens, angles included, are this rank's shards. Weights are the same at every rank, and their gradients
    are this rank's shares: sum them over the group. The other arguments and errors are those of
    `dash_dist.dash_attention`. `traffic` counts both halos and the exchange of the selected branch, and not what is
    gathered.

    Returns:
        This rank's shard of the output, and the RoutingStatistics of its tokens.
    """
    if cp_group is None:
        return nsa_attention_one_device(
            q,
            k,
            v,
            summary_query,
            branches,
            key_weights,
            value_weights,
            spec=spec,
            window=window,
            cu_seqlens=cu_seqlens,
            chunks=chunks,
            backend=backend,
            return_routing=True,
            memory=memory,
        )
    size = dist.get_world_size(cp_group)

    def check() -> tuple[Shard, tuple[Named, ...]]:
        check_nsa(q, k, v, summary_query, branches, key_weights, value_weights, spec)
        check_layout(layout)
        if ranks_per_node is not None:
            Topology(size, ranks_per_node)
        sequence = whole_chunks(q, chunks, cu_seqlens, spec, size, layout)
        packed = cu_seqlens is not None or chunks is not None
        documents = f"of documents {fingerprint(sequence)}" if packed else "not given"
        return Shard(cp_group, layout, sequence, spec.chunk_size), (("cu_seqlens", documents),)

    tensors = {"q": q, "k": k, "key_weights.inner": key_weights.inner, "value_weights.inner": value_weights.inner}
    shapes = ((f"shape of {name}", tuple(x.shape)) for name, x in tensors.items())
    how = {"spec": spec, "window": window, "layout": layout, "ranks_per_node": ranks_per_node}
    call_of_rank = (*shapes, ("dtype", str(q.dtype)), *how.items())
    shard = check_together(check, call_of_rank, cp_group, once=q.is_cuda)
    spec, traffic = spec.for_head_dim(q.shape[-1]), traffic or Traffic()
    topology = find_topology(cp_group, ranks_per_node)
    keys, values = gathered_blocks(branches, key_weights, value_weights, shard, spec, topology, traffic)
    compressed = compressed_attention(q, keys, values, shard.chunks, spec)
    selected, routing = dash_attention(
        q,
        k,
        v,
        summary_query,
        spec=spec,
        cu_seqlens=cu_seqlens,
        chunks=chunks,
        backend=backend,
        return_routing=True,
        cp_group=cp_group,
        layout=layout,
        exchange=exchange,
        ranks_per_node=ranks_per_node,
        traffic=traffic,
        memory=memory,
        summaries=by_chunk(keys.detach(), spec),
    )
    window_k, window_v, segments = with_halo(branches.window_k, branches.window_v, shard, window, topology, traffic)
    windowed = window_attention(q, window_k, window_v, segments, window=window, softmax_scale=spec.softmax_scale)
    return gated(branches.gates, compressed, selected, windowed), routing


def gathered_blocks(
    branches: Branches,
    key_weights: CompressionWeights,
    value_weights: CompressionWeights,
    shard: Shard,
    spec: AttentionSpec,
    topology: Topology,
    traffic: Traffic,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compressed keys and values of the whole sequence, [B, n x C / 16, Hkv, D] each, as `compressed_attention` takes.

    A collective call, as is its backward pass.
    """
    strides = Shard(shard.group, shard.layout, _strides(shard.sequence), STRIDE)
    reach = STRIDE + 1  # a stride and the one before it
    plan = plan_halo(strides.sequence, shard.rank, shard.size, shard.layout, chunk_size=STRIDE, window=reach)
    band_k, band_v, _ = with_halo(
        branches.compressed_k, branches.compressed_v, strides, reach, topology, traffic
    )  # [B, S', Hkv, D]
    _, _, own = on_device(plan, band_k.device)
    keys = compress(band_k.unflatten(1, (-1, STRIDE)), key_weights, own)
    keys = rotate_compressed(keys, branches.angles, shard.chunks, spec)
    values = compress(band_v.unflatten(1, (-1, STRIDE)), value_weights, own)
    both = torch.stack((keys, values), dim=2).unflatten(1, (shard.chunks_per_rank, -1))  # [B, slots, C / 16, 2, Hkv, D]
    gathered = gather_chunks(both, shard, "compressed keys and values of all chunks")
    found_k, found_v = gathered.flatten(1, 2).unbind(2)
    return found_k, found_v


@functools.lru_cache(maxsize=64)
def _strides(sequence: ChunkGrid) -> ChunkGrid:
    """Strides of a sequence of complete chunks, as chunks of 16 tokens."""
    starts = sequence.starts[sequence.ids == sequence.firsts].tolist()
    return ChunkGrid.packed([*starts, sequence.tokens], STRIDE)

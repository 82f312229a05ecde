"""Native Sparse Attention as a module: owner of the compression's weights, with the interface of `DashAttention`.

Knows the settings and the weights; does not know how the branches are computed, nor where their inputs come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.kept_output import with_kept_output
from dash_dist.context_parallel.module import DashAttention
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.sharded_nsa import gathered_blocks, nsa_attention
from dash_dist.context_parallel.topology import find_topology
from dash_kernels import AttentionSpec, ChunkGrid, RoutingStatistics
from dash_kernels.compression import CompressionWeights, compress, rotate_compressed, strides_of
from dash_kernels.nsa import Branches
from dash_kernels.selection import BLOCK
from dash_kernels.selection_scores import by_chunk


class NSAAttention(DashAttention):
    """Attention of q [B, T, Hq, D] by the three branches of `dash_kernels.nsa`, or of this rank's shards of them.

    The selected branch takes k and v, and all that `DashAttention` takes: its backend, exchange, telemetry and memory
    of recomputed layers. A recomputation with "full" fetches halos and compressed blocks again. `summary_query` is not
    read, and has a gradient of zeros. The compression's perceptrons are as wide inside as a head. Their weights are
    zeros: whoever builds a model draws them.

    Args:
        spec: with `selection.NSA`.
        window: tokens that a token of the window branch attends to, itself counted.
        options: as for `DashAttention`.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        spec: AttentionSpec,
        *,
        window: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(num_kv_heads, head_dim, spec, device=device, dtype=dtype, **options)
        self.window = window

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_kv_heads, *shape, device=device, dtype=dtype))

        # In this module itself: ZeRO-3 gathers the weights of a module whose forward runs.
        self.key_positions, self.value_positions = weight(BLOCK, head_dim), weight(BLOCK, head_dim)
        self.key_inner, self.value_inner = (weight(BLOCK * head_dim, head_dim) for _ in range(2))
        self.key_outer, self.value_outer = weight(head_dim, head_dim), weight(head_dim, head_dim)

    @property
    def key_weights(self) -> CompressionWeights:
        """Weights of the compression of keys."""
        return CompressionWeights(self.key_positions, self.key_inner, self.key_outer)

    @property
    def value_weights(self) -> CompressionWeights:
        """Weights of the compression of values."""
        return CompressionWeights(self.value_positions, self.value_inner, self.value_outer)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        *,
        chunks: ChunkGrid | None = None,
        branches: Branches | None = None,
    ) -> torch.Tensor:
        """Attention of each token of the branches; with a group, tokens are this rank's.

        Raises:
            ValueError: branches are missing, or a shape is not allowed, at any rank.
            ExchangeError: a rank of the group died or is late.
        """
        given = _required(branches)

        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            summary_query: torch.Tensor,
            compressed_k: torch.Tensor,
            compressed_v: torch.Tensor,
            window_k: torch.Tensor,
            window_v: torch.Tensor,
            gates: torch.Tensor,
            *weights: torch.Tensor,
        ) -> tuple[torch.Tensor, RoutingStatistics]:
            found: tuple[torch.Tensor, RoutingStatistics] = nsa_attention(
                q,
                k,
                v,
                summary_query,
                Branches(compressed_k, compressed_v, window_k, window_v, gates, given.angles),
                CompressionWeights(*weights[:3]),
                CompressionWeights(*weights[3:]),
                spec=self.spec,
                window=self.window,
                cu_seqlens=cu_seqlens,
                chunks=chunks,
                backend=self.backend,
                cp_group=self.cp_group,
                layout=self.layout,
                exchange=self.exchange,
                ranks_per_node=self.ranks_per_node,
                traffic=self.traffic,
                memory=self._memory_of("full"),
            )
            return found

        weights = *self.key_weights, *self.value_weights
        inputs = q, k, v, self.summary_query, *given.tensors, *weights
        out, routing = with_kept_output(self._memory_of("selective"), attend, *inputs)
        self.routing = routing if self.record_routing else None
        return out

    def summaries(
        self, branches: Branches | None, own: ChunkGrid, shard: Shard | None, spec: AttentionSpec
    ) -> torch.Tensor:
        """Compressed keys of the whole sequence, by which chunks are selected: [B, n, Hkv, C / 16 x D] by chunk id.

        A collective call with a shard; it counts no traffic.

        Args:
            own: chunks of this rank's tokens.
            spec: with softmax_scale as a number.
        """
        given = _required(branches)
        weights = self.key_weights
        if shard is None:
            keys = compress(strides_of(given.compressed_k, own, spec), weights)
            keys = rotate_compressed(keys, given.angles, own, spec)
        else:
            topology = find_topology(shard.group, self.ranks_per_node)
            keys, _ = gathered_blocks(given, weights, self.value_weights, shard, spec, topology, Traffic())
        return by_chunk(keys, spec)


def _required(branches: Branches | None) -> Branches:
    if branches is None:
        raise ValueError("branches are None, and NSA has a compressed and a window branch: give their keys and values")
    return branches

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


class Compression(nn.Module):
    """Weights of `dash_kernels.compression` for the keys or the values of some KV heads, as wide inside as a head.

    They start as zeros: whoever builds a model draws them.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_kv_heads, *shape, device=device, dtype=dtype))

        self.positions = weight(BLOCK, head_dim)
        self.inner = weight(BLOCK * head_dim, head_dim)
        self.outer = weight(head_dim, head_dim)

    @property
    def weights(self) -> CompressionWeights:
        return CompressionWeights(self.positions, self.inner, self.outer)


class NSAAttention(DashAttention):
    """Attention of q [B, T, Hq, D] by the three branches of `dash_kernels.nsa`, or of this rank's shards of them.

    The selected branch takes k and v, and all that `DashAttention` takes: its backend, exchange, telemetry and memory
    of recomputed layers. A recomputation with "full" fetches halos and compressed blocks again. `summary_query` is not
    read, and has a gradient of zeros.

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
        self.compress_keys = Compression(num_kv_heads, head_dim, device, dtype)
        self.compress_values = Compression(num_kv_heads, head_dim, device, dtype)

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

        weights = *self.compress_keys.weights, *self.compress_values.weights
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
        weights = self.compress_keys.weights
        if shard is None:
            keys = compress(strides_of(given.compressed_k, own, spec), weights)
            keys = rotate_compressed(keys, given.angles, own, spec)
        else:
            topology = find_topology(shard.group, self.ranks_per_node)
            keys, _ = gathered_blocks(given, weights, self.compress_values.weights, shard, spec, topology, Traffic())
        return by_chunk(keys, spec)


def _required(branches: Branches | None) -> Branches:
    if branches is None:
        raise ValueError("branches are None, and NSA has a compressed and a window branch: give their keys and values")
    return branches

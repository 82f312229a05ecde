"""DashAttention as a module: the owner of `summary_query` and of the settings of every call."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dash_dist.context_parallel.attention import dash_attention
from dash_dist.context_parallel.exchanges import check_exchange
from dash_dist.context_parallel.layout import check_layout
from dash_dist.context_parallel.recompute import ForwardMemory
from dash_dist.context_parallel.traffic import Traffic
from dash_kernels import RoutingStatistics


class DashAttention(nn.Module):
    """Attention of q [B, T, Hq, D], k and v [B, T, Hkv, D], or of this rank's shards of them with a cp_group.

    `summary_query` [num_kv_heads, head_dim] starts as zeros: a summary starts as the mean of its keys. While
    `record_routing` is True, `routing` holds the statistics of the last forward, over this rank's tokens.
    `traffic` adds up what forward and backward passes sent and waited for until it is asked. `recompute` says that the
    module runs under reentrant activation checkpointing, as Megatron-core's: first without gradients, then again with
    them just before the backward pass.
    For the settings see `dash_dist.dash_attention`.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        chunk_size: int = 64,
        alpha: float = 1.5,
        routing_scale: float = 1.0,
        prior_sigma: float | None = None,
        softmax_scale: float | None = None,
        backend: str = "auto",
        layout: str = "zigzag",
        exchange: str = "auto",
        cp_group: dist.ProcessGroup | None = None,
        ranks_per_node: int | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_layout(layout)
        check_exchange(exchange)
        self.summary_query = nn.Parameter(torch.zeros(num_kv_heads, head_dim, device=device, dtype=dtype))
        self.chunk_size = chunk_size
        self.alpha = alpha
        self.routing_scale = routing_scale
        self.prior_sigma = prior_sigma
        self.softmax_scale = softmax_scale
        self.backend = backend
        self.layout = layout
        self.exchange = exchange
        self.cp_group = cp_group
        self.ranks_per_node = ranks_per_node
        self.traffic = Traffic()
        self.memory = ForwardMemory() if recompute else None
        self.record_routing = False
        self.routing: RoutingStatistics | None = None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        out, routing = dash_attention(
            q,
            k,
            v,
            self.summary_query,
            chunk_size=self.chunk_size,
            alpha=self.alpha,
            routing_scale=self.routing_scale,
            prior_sigma=self.prior_sigma,
            softmax_scale=self.softmax_scale,
            backend=self.backend,
            return_routing=True,
            cu_seqlens=cu_seqlens,
            cp_group=self.cp_group,
            layout=self.layout,
            exchange=self.exchange,
            ranks_per_node=self.ranks_per_node,
            traffic=self.traffic,
            memory=self.memory if self.training else None,
        )
        self.routing = routing if self.record_routing else None
        return out

    def extra_repr(self) -> str:
        heads, dim = self.summary_query.shape
        return (
            f"num_kv_heads={heads}, head_dim={dim}, chunk_size={self.chunk_size}, alpha={self.alpha}, "
            f"layout={self.layout}, exchange={self.exchange}"
        )

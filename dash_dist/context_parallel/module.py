"""DashAttention as a module: owner of `summary_query` and of the settings of every call.

Knows the settings; does not know how the attention is computed.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
import torch.distributed as dist
from torch import nn

from dash_dist.context_parallel.dense import dense_attention_one_device, dense_spec
from dash_dist.context_parallel.exchange import check_exchange
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.kept_output import KeptOutput, with_kept_output
from dash_dist.context_parallel.layout import check_layout
from dash_dist.context_parallel.recompute import ForwardMemory
from dash_dist.context_parallel.sharded_attention import dash_attention
from dash_kernels import AttentionSpec, ChunkGrid, RoutingStatistics
from dash_kernels.spec import AttentionSettings

Recompute = Literal["none", "full", "selective"]


class DashAttention(nn.Module):
    """Attention of q [B, T, Hq, D], k and v [B, T, Hkv, D], or of this rank's shards of them with a cp_group.

    `summary_query` [num_kv_heads, head_dim] starts as zeros: a summary starts as the mean of its keys. While
    `record_routing` is True, `routing` holds the statistics of the last forward, over this rank's tokens. `traffic`
    counts the bytes and waits of forward and backward passes until they are taken. `recompute` is for reentrant
    activation checkpointing, as in Megatron-core: a pass without gradients, then one with them just before the
    backward pass. With "full", the second pass takes the routing of the first one; with "selective" its output and
    all that the backward pass needs beside q, k and v. With `dense`, the attention selects every chunk and has no bias,
    and of the settings only chunk_size and softmax_scale count, and there is no routing to record; on one device whole
    sequences take torch's own kernels. For `spec`, `settings` and the other arguments see `dash_dist.dash_attention`.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        spec: AttentionSpec | None = None,
        *,
        backend: str = "auto",
        layout: str = "zigzag",
        exchange: str = "auto",
        cp_group: dist.ProcessGroup | None = None,
        ranks_per_node: int | None = None,
        recompute: Recompute = "none",
        dense: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[AttentionSettings],
    ):
        super().__init__()
        check_layout(layout)
        check_exchange(exchange)
        self.summary_query = nn.Parameter(torch.zeros(num_kv_heads, head_dim, device=device, dtype=dtype))
        self.spec = (spec or AttentionSpec()).replaced(**settings)
        if dense:
            self.spec = dense_spec(chunk_size=self.spec.chunk_size, softmax_scale=self.spec.softmax_scale)
        self.dense = dense
        self.backend = backend
        self.layout = layout
        self.exchange = exchange
        self.cp_group = cp_group
        self.ranks_per_node = ranks_per_node
        self.traffic = Traffic()
        self.recompute = recompute
        self.memory: ForwardMemory[Any] | None = None if recompute == "none" else ForwardMemory()
        self.record_routing = False
        self.routing: RoutingStatistics | None = None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        *,
        chunks: ChunkGrid | None = None,
    ) -> torch.Tensor:
        recorded = self.record_routing and not self.dense

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, summary_query: torch.Tensor
        ) -> tuple[torch.Tensor, RoutingStatistics | None]:
            if self.dense and self.cp_group is None and cu_seqlens is None and chunks is None:
                spec = self.spec.for_head_dim(q.shape[-1])
                return dense_attention_one_device(q, k, v, summary_query, spec), None
            found = dash_attention(
                q,
                k,
                v,
                summary_query,
                spec=self.spec,
                cu_seqlens=cu_seqlens,
                chunks=chunks,
                backend=self.backend,
                return_routing=recorded,
                cp_group=self.cp_group,
                layout=self.layout,
                exchange=self.exchange,
                ranks_per_node=self.ranks_per_node,
                traffic=self.traffic,
                memory=self._memory_of("full"),
            )
            return found if recorded else (found, None)

        outputs: ForwardMemory[KeptOutput] | None = self._memory_of("selective")
        out, self.routing = with_kept_output(outputs, attend, q, k, v, self.summary_query)
        return out

    def _memory_of(self, recompute: Recompute) -> ForwardMemory[Any] | None:
        return self.memory if self.training and self.recompute == recompute else None

    def extra_repr(self) -> str:
        heads, dim = self.summary_query.shape
        return (
            f"num_kv_heads={heads}, head_dim={dim}, chunk_size={self.spec.chunk_size}, alpha={self.spec.alpha}, "
            f"layout={self.layout}, exchange={self.exchange}"
        )

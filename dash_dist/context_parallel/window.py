"""Window attention over a context-parallel group, as a module with the interface of `DashAttention`.

Knows what the ranks must agree on, and that a halo of K and V comes before each stretch of the shard; does not know
how it travels, as `halo` does, nor how the attention is computed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from dash_dist.context_parallel.agreement import Named, check_together
from dash_dist.context_parallel.dense import with_zero_gradient
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.halo import with_halo
from dash_dist.context_parallel.kept_output import KeptOutput, with_kept_output
from dash_dist.context_parallel.layout import check_layout
from dash_dist.context_parallel.recompute import ForwardMemory
from dash_dist.context_parallel.shard import Shard, fingerprint, whole_chunks
from dash_dist.context_parallel.topology import find_topology
from dash_dist.cost_model.topology import Topology
from dash_kernels import AttentionSpec, ChunkGrid
from dash_kernels.arguments import check_tensors, sequence_chunks
from dash_kernels.window import document_segments, window_attention


class WindowAttention(nn.Module):
    """Attention of q [B, T, Hq, D] to the last `window` tokens of k and v [B, T, Hkv, D], or of this rank's shards.

    A token attends within its own document, and counts itself. With a group, documents are whole chunks.
    `summary_query` [num_kv_heads, head_dim] is not read and has a gradient of zeros: a layer keeps it when its kind
    changes, and the layers of a checkpoint are alike. `traffic` is that of `DashAttention`. With `keep_output`, the
    recomputation of a layer under reentrant activation checkpointing takes the first pass's output, and fetches the
    halo again.

    Raises:
        ValueError: the window or the layout is not allowed; a call's shapes or documents are not, at any rank.
        ExchangeError: in a call, a rank of the group died or is late.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        window: int,
        *,
        chunk_size: int,
        softmax_scale: float | None = None,
        layout: str = "zigzag",
        cp_group: dist.ProcessGroup | None = None,
        ranks_per_node: int | None = None,
        keep_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_layout(layout)
        self.summary_query = nn.Parameter(torch.zeros(num_kv_heads, head_dim, device=device, dtype=dtype))
        self.window = window
        self.spec = AttentionSpec(chunk_size=chunk_size, softmax_scale=softmax_scale)
        self.layout = layout
        self.cp_group = cp_group
        self.ranks_per_node = ranks_per_node
        self.traffic = Traffic()
        self.memory: ForwardMemory[KeptOutput] | None = ForwardMemory() if keep_output else None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, chunks: ChunkGrid | None = None
    ) -> torch.Tensor:
        if self.cp_group is None:
            check_tensors(q, k, v, self.summary_query)
            segments = document_segments(sequence_chunks(chunks, None, q, q.shape[1], self.spec))
        else:
            shard, topology = self._shard(q, k, v, chunks, self.cp_group)
            k, v, segments = with_halo(k, v, shard, self.window, topology, self.traffic)
            self.traffic.halo()

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
            scale = self.spec.softmax_scale
            return window_attention(q, k, v, segments, window=self.window, softmax_scale=scale), None

        out, _ = with_kept_output(self.memory if self.training else None, attend, q, k, v)
        return with_zero_gradient(out, self.summary_query)

    def _shard(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: ChunkGrid | None, group: dist.ProcessGroup
    ) -> tuple[Shard, Topology]:
        """Check the call at every rank of the group together."""
        size = dist.get_world_size(group)

        def check() -> tuple[Shard, tuple[Named, ...]]:
            check_tensors(q, k, v, self.summary_query)
            if self.ranks_per_node is not None:
                Topology(size, self.ranks_per_node)
            sequence = whole_chunks(q, chunks, None, self.spec, size, self.layout)
            documents = "not given" if chunks is None else f"of documents {fingerprint(sequence)}"
            return Shard(group, self.layout, sequence, self.spec.chunk_size), (("chunks", documents),)

        call = (
            *((f"shape of {name}", tuple(x.shape)) for name, x in {"q": q, "k": k, "v": v}.items()),
            ("dtype", str(q.dtype)),
            *((name, getattr(self, name)) for name in ("window", "layout", "ranks_per_node", "spec")),
        )
        shard = check_together(check, call, group, once=q.is_cuda)
        return shard, find_topology(group, self.ranks_per_node)

    def extra_repr(self) -> str:
        heads, dim = self.summary_query.shape
        return f"num_kv_heads={heads}, head_dim={dim}, window={self.window}, layout={self.layout}"

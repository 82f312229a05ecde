"""Selection counts of a rank's shard, recomputed from the inputs of an attention.

Knows shards and the stages of routing; does not know layers, nor the sum over ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dash_dist.context_parallel.module import DashAttention
from dash_dist.context_parallel.nsa import NSAAttention
from dash_dist.context_parallel.shard import Shard
from dash_kernels.arguments import sequence_chunks
from dash_kernels.backend import select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.nsa import Branches
from dash_kernels.selection_counts import selection_counts
from dash_kernels.spec import Queries


@torch.no_grad()
def shard_selections(
    attention: DashAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    chunks: ChunkGrid | None,
    *,
    bins: int,
    branches: Branches | None = None,
) -> torch.Tensor:
    """`selection_counts` of this rank's shard, for inputs that `attention` has just accepted.

    Routes once more: one all-gather of summaries, and no exchange of K and V. A collective call of the
    context-parallel group.

    Args:
        q, k, chunks, branches: as `attention` takes them.
        bins: upper limit; a sequence of fewer chunks has one bin per chunk.

    Returns:
        int64 [2, bins, bins], selected and available; the sum over the ranks of the group is that of the sequence.
    """
    spec = attention.spec.for_head_dim(q.shape[-1])
    stages = select_backend(attention.backend, q, k.shape[2], spec)
    group = attention.cp_group
    seq_len = q.shape[1] * (1 if group is None else dist.get_world_size(group))
    sequence = sequence_chunks(chunks, None, q, seq_len, spec)
    shard = None if group is None else Shard(group, attention.layout, sequence, spec.chunk_size)
    own = sequence if shard is None else shard.chunks
    if isinstance(attention, NSAAttention):
        summaries = attention.summaries(branches, own, shard, spec)
    else:
        summaries = stages.summarize(k, own, attention.summary_query, spec)
        if shard is not None:
            summaries = shard.gather_summaries(summaries)
    routing = stages.route(q, own, summaries, spec)
    return selection_counts(Queries(q, own, summaries, routing), spec, min(bins, len(sequence)))

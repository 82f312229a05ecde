"""Which stretches of a sequence the queries of a rank's shard selected, found again from the inputs of an attention.

Knows shards and the stages that routing consists of; does not know layers, nor who adds the ranks up.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dash_dist.context_parallel.module import DashAttention
from dash_dist.context_parallel.shard import Shard
from dash_kernels.arguments import check_arguments
from dash_kernels.attention import packed_chunks
from dash_kernels.backend import select_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.selection_counts import selection_counts
from dash_kernels.spec import Queries


@torch.no_grad()
def shard_selections(
    attention: DashAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    bins: int,
) -> torch.Tensor:
    """`selection_counts` of the tokens of this rank's shard, for inputs that `attention` has just accepted.

    Routes once more: one all-gather of summaries, and no exchange of K and V. With a context-parallel group a
    collective of it.

    Args:
        q, k, cu_seqlens: as `attention` takes them.
        bins: at most; a sequence of fewer chunks has one bin per chunk.

    Returns:
        int64 [2, bins, bins], selected and available; sums over the ranks of the group are those of the sequence.
    """
    spec = check_arguments(
        q,
        k,
        k,
        attention.summary_query,
        chunk_size=attention.chunk_size,
        alpha=attention.alpha,
        routing_scale=attention.routing_scale,
        prior_sigma=attention.prior_sigma,
        softmax_scale=attention.softmax_scale,
    )
    stages = select_backend(attention.backend, q, k.shape[2], spec)
    group = attention.cp_group
    seq_len = q.shape[1] * (1 if group is None else dist.get_world_size(group))
    if cu_seqlens is None:
        sequence = ChunkGrid.whole_sequence(seq_len, attention.chunk_size)
    else:
        sequence = packed_chunks(cu_seqlens, q, seq_len, attention.chunk_size)
    shard = None if group is None else Shard(group, attention.layout, sequence, attention.chunk_size)
    chunks = sequence if shard is None else shard.chunks
    summaries = stages.summarize(k, chunks, attention.summary_query, spec)
    if shard is not None:
        summaries = shard.gather_summaries(summaries)
    routing = stages.route(q, chunks, summaries, spec)
    return selection_counts(Queries(q, chunks, summaries, routing), spec, min(bins, len(sequence)))

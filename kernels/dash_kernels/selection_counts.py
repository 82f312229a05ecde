"""How many queries of a stretch of the sequence selected the chunks of another: routing at a size that fits a picture.

Knows thresholds and chunk ids; does not know ranks, nor what the counts are for. The same code for every backend: it
compares the scores with the thresholds once more, one chunk of queries at a time, which costs about as much as one
sweep of the routing.
"""

from __future__ import annotations

import torch

from dash_kernels.eager_walk import probabilities, query_blocks, routing_scores
from dash_kernels.spec import AttentionSpec, Queries


def selection_counts(queries: Queries, spec: AttentionSpec, bins: int) -> torch.Tensor:
    """Counts (token, KV head, key chunk) triples by stretch of the sequence.

    The n chunks of the sequence fall into `bins` stretches, chunk i into stretch i x bins // n. Memory is bins x n
    integers and the scores of one chunk of queries. Scores are computed in the summaries' dtype, so that a chunk at the
    very edge of the support may be counted otherwise than a backend with another order of sums selected it.

    Args:
        queries: their chunks may be any of the sequence; `routing.tau` is read.
        bins: 1 to n.

    Returns:
        int64 [2, bins, bins] on the device of q: triples that were selected, and all that were causally available, the
        own chunk counted in both; [:, i, j] is of queries in stretch i and key chunks in stretch j. Those of several
        shards of a sequence add up to those of the whole.

    Raises:
        ValueError: bins is not in 1 to n.
    """
    q, summaries = queries.q, queries.summaries
    batch, n, kv_heads, _ = summaries.shape
    if not 1 <= bins <= n:
        raise ValueError(f"bins is {bins}: give 1 to {n}, the chunks of the sequence")
    selected = torch.zeros(bins, n, dtype=torch.int64, device=q.device)
    for block in query_blocks(q, queries.chunks, kv_heads):
        if block.chunk == block.first:
            continue
        x = routing_scores(block.q, summaries[:, block.earlier], spec)
        routed = probabilities(x, block.rows(queries.routing.tau), spec).mean(2) > 0  # [B, Hkv, C, j]
        selected[block.chunk * bins // n, block.earlier] += routed.sum((0, 1, 2))
    ids, lengths, firsts = (x.long() for x in (queries.chunks.ids, queries.chunks.lengths, queries.chunks.firsts))
    stretch, pairs = ids * bins // n, lengths * batch * kv_heads
    own = torch.zeros(bins, n, dtype=torch.int64).index_put_((stretch, ids), pairs, accumulate=True)
    # Available are first to id: up at the one, down after the other.
    changes = torch.zeros(bins, n + 1, dtype=torch.int64)
    changes.index_put_((stretch, firsts), pairs, accumulate=True)
    changes.index_put_((stretch, ids + 1), -pairs, accumulate=True)
    available = changes.cumsum(1)[:, :n]
    by_chunk = torch.stack((selected + own.to(q.device), available.to(q.device)))
    counts = torch.zeros(2, bins, bins, dtype=torch.int64, device=q.device)
    return counts.index_add_(2, torch.arange(n, device=q.device) * bins // n, by_chunk)

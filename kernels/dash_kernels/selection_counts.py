"""Counts of selected chunks by stretch of the sequence: routing at a size that fits a picture.

Knows thresholds and chunk ids; does not know ranks, nor pictures. One code serves every backend: it compares scores
with thresholds again, one chunk of queries at a time. That costs about as much as one sweep of the routing.
"""

from __future__ import annotations

import torch

from dash_kernels.eager_selection import probabilities, query_chunks, routing_scores
from dash_kernels.first_chunk import after_first_chunks
from dash_kernels.spec import AttentionSpec, Queries


def selection_counts(queries: Queries, spec: AttentionSpec, bins: int) -> torch.Tensor:
    """Counts (token, KV head, key chunk) triples by stretch of the sequence.

    The n chunks of the sequence fall into `bins` stretches, chunk i into stretch i x bins // n. Memory is bins x n
    integers and the scores of one chunk of queries. Scores are computed in the summaries' dtype. At the very edge of
    the support a backend with another order of sums may therefore have selected otherwise.

    Args:
        queries: any chunks of the sequence; `routing.tau` or `routing.lists` is read.
        bins: 1 to n.

    Returns:
        int64 [2, bins, bins] on the device of q: selected triples, and causally available ones, the own chunk counted
        in both. [:, i, j] is for queries in stretch i and key chunks in stretch j. The counts of the shards of a
        sequence add up to those of the whole.

    Raises:
        ValueError: bins is not in 1 to n.
    """
    q, summaries = queries.q, queries.summaries
    batch, n, kv_heads, _ = summaries.shape
    if not 1 <= bins <= n:
        raise ValueError(f"bins is {bins}: give 1 to {n}, the chunks of the sequence")
    selected = torch.zeros(bins, n, dtype=torch.int64, device=q.device)
    routed_chunks = after_first_chunks(queries.chunks) if spec.attend_first_chunk else queries.chunks
    for chunk in query_chunks(q, routed_chunks, kv_heads):
        if chunk.id == chunk.first:
            continue
        if queries.routing.lists is not None:
            routed = queries.routing.listed(chunk.tokens, n)[..., chunk.earlier]
        else:
            x = routing_scores(chunk.q, summaries[:, chunk.earlier], spec)
            routed = probabilities(x, chunk.rows(queries.routing.tau), spec).mean(2) > 0  # [B, Hkv, C, j]
        selected[chunk.id * bins // n, chunk.earlier] += routed.sum((0, 1, 2))
    ids, lengths, firsts = (x.long() for x in (queries.chunks.ids, queries.chunks.lengths, queries.chunks.firsts))
    stretch, pairs = ids * bins // n, lengths * batch * kv_heads
    always = torch.zeros(bins, n, dtype=torch.int64).index_put_((stretch, ids), pairs, accumulate=True)
    if spec.attend_first_chunk:
        later = ids > firsts
        always.index_put_((stretch[later], firsts[later]), pairs[later], accumulate=True)
    # Chunks first to id are available: +1 at first, -1 after id.
    changes = torch.zeros(bins, n + 1, dtype=torch.int64)
    changes.index_put_((stretch, firsts), pairs, accumulate=True)
    changes.index_put_((stretch, ids + 1), -pairs, accumulate=True)
    available = changes.cumsum(1)[:, :n]
    by_chunk = torch.stack((selected + always.to(q.device), available.to(q.device)))
    counts = torch.zeros(2, bins, bins, dtype=torch.int64, device=q.device)
    return counts.index_add_(2, torch.arange(n, device=q.device) * bins // n, by_chunk)

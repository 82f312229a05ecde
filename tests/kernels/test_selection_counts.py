"""Counts of selected chunks by stretch of the sequence, against a count of every query and chunk by itself."""

import pytest
import torch

from dash_kernels import eager
from dash_kernels.chunks import ChunkGrid
from dash_kernels.eager_selection import probabilities, routing_scores
from dash_kernels.selection_counts import selection_counts
from dash_kernels.spec import AttentionSpec, Queries

CHUNK = 16
SPEC = AttentionSpec(chunk_size=CHUNK, alpha=1.5, routing_scale=24.0, prior_sigma=None, softmax_scale=0.35)
GRIDS = {
    "one document": ChunkGrid.whole_sequence(8 * CHUNK, CHUNK),
    "an unfinished chunk": ChunkGrid.whole_sequence(7 * CHUNK + 5, CHUNK),
    "documents": ChunkGrid.packed((0, 40, 40, 3 * CHUNK + 40, 7 * CHUNK), CHUNK),
}


def routed(grid: ChunkGrid, chunks: ChunkGrid | None = None) -> Queries:
    """Random queries of `chunks`, by default of all of `grid`, routed over all of it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, grid.tokens, 4, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(2, grid.tokens, 2, 8, generator=generator, dtype=torch.float64)
    summaries = eager.summarize(k, grid, torch.zeros(2, 8), SPEC)
    if chunks is not None:
        starts = [int(grid.starts[i]) for i in chunks.ids]
        q = torch.cat([q[:, start : start + CHUNK] for start in starts], dim=1)
    grid = chunks or grid
    return Queries(q, grid, summaries, eager.route(q, grid, summaries, SPEC))


def counted_one_by_one(queries: Queries, bins: int) -> torch.Tensor:
    n = queries.summaries.shape[1]
    counts = torch.zeros(2, bins, bins, dtype=torch.int64)
    for chunk, start, length, first in queries.chunks.on(torch.device("cpu")).T.tolist():
        for token in range(start, start + length):
            for key in range(first, chunk + 1):
                for head in range(2):
                    q = queries.q[:, token, 2 * head : 2 * head + 2].view(2, 1, 2, 1, 8)
                    x = routing_scores(q, queries.summaries[:, key : key + 1, head : head + 1], SPEC)
                    tau = queries.routing.tau[:, token, 2 * head : 2 * head + 2].view(2, 1, 2, 1)
                    chosen = (probabilities(x, tau, SPEC) > 0).any(2).sum() if key < chunk else 2
                    at = chunk * bins // n, key * bins // n
                    counts[:, at[0], at[1]] += torch.tensor([int(chosen), 2])
    return counts


@pytest.mark.parametrize("bins", [1, 3, 7])
@pytest.mark.parametrize("name", GRIDS)
def test_every_query_and_chunk_is_counted_once(name, bins):
    queries = routed(GRIDS[name])
    counts = selection_counts(queries, SPEC, bins)
    assert torch.equal(counts, counted_one_by_one(queries, bins))
    assert counts[0].sum() == queries.routing.selected.sum()
    assert counts[0].sum() < counts[1].sum()


def test_shards_add_up_to_the_sequence():
    grid = GRIDS["one document"]
    shards = [selection_counts(routed(grid, grid.take(slots)), SPEC, 4) for slots in ((0, 1, 6, 7), (2, 3, 4, 5))]
    assert torch.equal(sum(shards), selection_counts(routed(grid), SPEC, 4))


@pytest.mark.parametrize("bins", [0, 9])
def test_bins_must_fit_the_chunks(bins):
    with pytest.raises(ValueError, match=f"bins is {bins}: give 1 to 8"):
        selection_counts(routed(GRIDS["one document"]), SPEC, bins)

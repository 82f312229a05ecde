"""Selection of a fixed number of chunks: every backend against the float64 reference, and the rule at its edges."""

from typing import Any

import pytest
import torch

from dash_kernels import AttentionSpec, ChunkGrid, dash_attention, eager
from dash_kernels import triton as triton_backend
from dash_kernels.listed_routing import largest
from dash_kernels.query_blocks import query_blocks
from dash_kernels.reference_selection import reference_selected_attention
from dash_kernels.selection import InfLLMv2, SelectionRule, TopChunks
from dash_kernels.selection_counts import selection_counts
from dash_kernels.spec import Blocks, Part, Queries
from tests.kernels.attention_inputs import DEVICE, Inputs, assert_near, output_and_gradients, random_inputs
from tests.kernels.test_parts import by_parts, shards_of

C = 16
DOCUMENTS = (0, 1, 64, 64, 70, 187)
TOP = TopChunks(4)
INFLLM = InfLLMv2(4, first_chunks=1, local_chunks=1, dense_length=0)
PARTLY_DENSE = InfLLMv2(3, first_chunks=0, local_chunks=1, dense_length=70)


def both(
    inputs: Inputs,
    selection: SelectionRule,
    cu_seqlens: torch.Tensor | None = None,
    *,
    chunk_size: int = C,
    **arguments: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Output and gradients of the call and of the reference."""
    spec = AttentionSpec(chunk_size, routing_scale=3.0, selection=selection)
    found = output_and_gradients(dash_attention, inputs, spec=spec, cu_seqlens=cu_seqlens, **arguments)
    expected = output_and_gradients(
        reference_selected_attention,
        inputs.to(torch.float64),
        selection=selection,
        chunk_size=chunk_size,
        routing_scale=3.0,
        cu_seqlens=cu_seqlens,
    )
    return found, expected


@pytest.mark.parametrize("selection", [TOP, TopChunks(2), TopChunks(100), INFLLM, PARTLY_DENSE])
@pytest.mark.parametrize("borders", [None, DOCUMENTS])
@pytest.mark.parametrize(("group", "tokens"), [(1, 187), (3, 187)])
def test_eager_equals_the_reference(
    selection: SelectionRule, borders: tuple[int, ...] | None, group: int, tokens: int
) -> None:
    inputs = random_inputs(tokens, group=group, batch=1 if borders else 2, head_dim=16)
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    assert_near(*both(inputs, selection, cu_seqlens), 1e-12)


@pytest.mark.parametrize("selection", [TOP, INFLLM, PARTLY_DENSE])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_lengths_around_the_first_chunks(tokens: int, selection: SelectionRule) -> None:
    assert_near(*both(random_inputs(tokens, head_dim=16), selection), 1e-12)


@pytest.mark.parametrize("borders", [None, (0, 31, 130, 431)])
@pytest.mark.parametrize("chunk_size", [32, 64])
def test_kernels_of_longer_chunks(chunk_size: int, borders: tuple[int, ...] | None) -> None:
    """Several kernels overlap a chunk, and one of them the next chunk as well."""
    inputs = random_inputs(431, head_dim=16, group=2, kv_heads=1)
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    assert_near(*both(inputs, INFLLM, cu_seqlens, chunk_size=chunk_size), 1e-12)


def test_blocks_of_queries_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(187, head_dim=16)
    whole = both(inputs, TOP)[0]
    monkeypatch.setattr("dash_kernels.listed_routing.MAX_SCORES", 1)
    grid = ChunkGrid.packed(DOCUMENTS, C)
    assert [len(block.slots) for block in query_blocks(grid, torch.device("cpu"), 1)] == [1] * len(grid)
    assert [block.end for block in query_blocks(grid, torch.device("cpu"), 40)] == [2, 4, 6, 8, 10, 12, 14]
    assert_near(both(inputs, TOP)[0], whole, 1e-12)


def test_of_equal_scores_the_first_are_taken() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0], [-torch.inf, 3.0, 0.0, 0.0, -torch.inf, 0.0]])
    wanted = torch.tensor([[1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1]], dtype=torch.bool)
    assert torch.equal(largest(scores, 4), wanted)


@pytest.mark.parametrize("selection", [TopChunks(3), InfLLMv2(3, first_chunks=0, local_chunks=0, dense_length=0)])
@pytest.mark.parametrize("stages", [eager, triton_backend])
def test_equal_scores_give_the_first_chunks(stages: Any, selection: SelectionRule) -> None:
    inputs = random_inputs(6 * C + 5, kv_heads=1, group=2, dtype=torch.float32)
    inputs.q[:] = 0
    grid = ChunkGrid.whole_sequence(6 * C + 5, C)
    spec = AttentionSpec(C, selection=selection).for_head_dim(32)
    summaries = stages.summarize(inputs.k, grid, inputs.summary_query, spec)
    routing = stages.route(inputs.q, grid, summaries, spec)
    n = len(grid)
    wanted = [[n, n], [0, n], *[[0, 1]] * 5]  # by chunk of the query
    for token in range(6 * C + 5):
        assert routing.lists[0, token, 0].tolist() == wanted[token // C]
    assert routing.selected.flatten().tolist() == [min(token // C + 1, 3) for token in range(6 * C + 5)]


def test_what_a_key_is_reaches_a_later_chunk_only_where_it_was_selected() -> None:
    """A chunk with NaN is left out, and so are the gradients of all that nobody selected."""
    inputs = random_inputs(8 * C, head_dim=16)
    inputs.k[:, 2 * C + 3] = torch.nan
    spec = AttentionSpec(C, selection=TopChunks(4))
    out = dash_attention(inputs.q, inputs.k, inputs.v, inputs.summary_query, spec=spec)
    assert out[:, 3 * C :].isfinite().all()
    assert out[:, 2 * C + 3 : 3 * C].isnan().all()


def test_counts_are_those_of_the_lists() -> None:
    inputs = random_inputs(8 * C, head_dim=16)
    grid = ChunkGrid.whole_sequence(8 * C, C)
    spec = AttentionSpec(C, selection=TOP).for_head_dim(16)
    summaries = eager.summarize(inputs.k, grid, inputs.summary_query, spec)
    queries = Queries(inputs.q, grid, summaries, eager.route(inputs.q, grid, summaries, spec))
    selected, available = selection_counts(queries, spec, 8)
    per_chunk = C * inputs.k.shape[2]
    assert selected.sum(1).tolist() == [min(chunk + 1, 4) * per_chunk for chunk in range(8)]
    assert available.sum(1).tolist() == [(chunk + 1) * per_chunk for chunk in range(8)]


def test_statistics() -> None:
    inputs = random_inputs(8 * C, head_dim=16)
    spec = AttentionSpec(C, selection=TOP)
    _, routing = dash_attention(*list(vars(inputs).values())[:4], spec=spec, return_routing=True)
    assert float(routing.density) == pytest.approx((1 + 2 + 3 + 5 * 4) / (8 * 9 / 2))


@pytest.mark.parametrize(
    ("selection", "dtype", "tolerance", "group", "borders"),
    [
        (TopChunks(3), torch.float32, 2e-5, 3, None),
        (TopChunks(3), torch.float16, 3e-3, 4, (0, 1, 64, 64, 70, 99)),
        (TopChunks(3), torch.float16, 3e-3, 1, None),
        (INFLLM, torch.float32, 2e-5, 2, None),
        (PARTLY_DENSE, torch.float16, 3e-3, 3, (0, 1, 64, 64, 70, 170)),
    ],
)
def test_triton_equals_the_reference(
    selection: SelectionRule, dtype: torch.dtype, tolerance: float, group: int, borders: tuple[int, ...] | None
) -> None:
    inputs = random_inputs(borders[-1] if borders else 99, kv_heads=1, group=group, dtype=dtype)
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    assert_near(*both(inputs, selection, cu_seqlens, backend="triton"), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "dtype", "tolerance"), [(eager, torch.float64, 1e-12), (triton_backend, torch.float32, 2e-5)]
)
@pytest.mark.parametrize("selection", [TopChunks(3), INFLLM])
def test_shards_and_the_blocks_that_they_reached_are_the_whole(
    stages: Any, dtype: torch.dtype, tolerance: float, selection: SelectionRule
) -> None:
    """As ranks with the selective exchange: the own part, then single heads' chunks."""
    n = 6
    inputs = random_inputs(n * C, kv_heads=2, group=2, dtype=dtype)
    spec = AttentionSpec(C, routing_scale=3.0, selection=selection).for_head_dim(32)
    grid = ChunkGrid.whole_sequence(n * C, C)
    summaries = stages.summarize(inputs.k, grid, inputs.summary_query, spec)
    kv = torch.stack((inputs.k, inputs.v), 1).unflatten(2, (n, C)).permute(0, 4, 2, 1, 3, 5).flatten(0, 2)
    dkv = torch.zeros_like(kv, dtype=summaries.dtype)
    expected = both(inputs, selection)[1]
    found = {name: torch.zeros_like(wanted, dtype=summaries.dtype) for name, wanted in expected.items()}
    for chunks, tokens in shards_of(grid, 2):
        q = inputs.q[:, tokens]
        queries = Queries(q, chunks, summaries, stages.route(q, chunks, summaries, spec))
        reached = stages.reached(queries.routing, chunks, n, spec).clone()
        reached[:, :, chunks.ids] = False
        addresses = reached.flatten().nonzero().flatten()
        own = Part(inputs.k[:, tokens], inputs.v[:, tokens], chunks)
        blocks = Blocks(kv[addresses].clone(), addresses.to(DEVICE))
        out, dq, (down, dblocks), dc = by_parts(
            stages, queries, inputs.grad[:, tokens], [own, blocks], inputs.summary_query, spec
        )
        found["output"][:, tokens], found["q"][:, tokens] = out.to(summaries.dtype), dq.to(summaries.dtype)
        found["k"][:, tokens] += down[0]
        found["v"][:, tokens] += down[1]
        dkv[addresses] += dblocks
        found["summary_query"] += dc
    dk, dv = dkv.unflatten(0, (1, 2, n)).permute(3, 0, 2, 4, 1, 5).flatten(2, 3)
    found["k"] += dk
    found["v"] += dv
    assert_near(found, expected, tolerance)


def test_counts_that_are_too_low_are_refused() -> None:
    with pytest.raises(ValueError, match="count is 1: give 2 chunks or more"):
        TopChunks(1)
    with pytest.raises(ValueError, match="count is 33, and 34 chunks are always selected: 1 first and 32 local ones"):
        InfLLMv2(33)

"""The stages over shards of a sequence, as the ranks of a group hold them, against the call on all of it."""

from types import ModuleType
from typing import Any

import pytest
import torch

from dash_kernels import dash_attention, eager
from dash_kernels import triton as triton_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries
from tests.kernels.attention_inputs import (
    DEVICE,
    NAMES,
    Inputs,
    assert_near,
    clear_inputs,
    output_and_gradients,
    random_inputs,
)

C = 16
# The stages, what they run in, how close they must come, and the query heads of a KV head.
BACKENDS: dict[str, tuple[ModuleType, torch.dtype, float, int]] = {
    "eager": (eager, torch.float64, 1e-10, 4),
    "triton float32": (triton_backend, torch.float32, 2e-5, 2),
    "triton float16": (triton_backend, torch.float16, 3e-3, 2),
}


def shards_of(grid: ChunkGrid, count: int) -> list[tuple[ChunkGrid, torch.Tensor]]:
    """Every shard's chunks, dealt out in turn and every other hand backwards, and where its tokens are."""
    shards = []
    for index in range(count):
        slots = torch.arange(index, len(grid), count).flip(0) if index % 2 else torch.arange(index, len(grid), count)
        tokens = [torch.arange(int(grid.starts[slot]), int(grid.starts[slot] + grid.lengths[slot])) for slot in slots]
        shards.append((grid.take(slots.tolist()), torch.cat(tokens)))
    return shards


def by_parts(
    stages: ModuleType,
    queries: Queries,
    grad: torch.Tensor,
    parts: list[Part | Blocks],
    summary_query: torch.Tensor,
    spec: Any,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(output, gradient of q, of every part, of summary_query), the first part that of the queries themselves."""
    state = None
    for part in parts:
        last = part is parts[-1]
        state = stages.attend(queries, part, spec, before=state, last=last)
        assert state[0].dtype == (queries.q.dtype if last else queries.summaries.dtype)
    out, lse = state
    upstream = OutputGradient(grad, lse, stages.row_dots(grad, out))
    sums = None
    for part in parts[:-1]:
        sums = stages.query_gradient(queries, upstream, part, spec, sums)
    dq, ratio = stages.finish_query_gradient(queries, upstream, parts[-1], spec, sums)
    assert dq.dtype == queries.q.dtype
    dparts, dsummary_queries = zip(
        *(stages.key_gradient(queries, upstream, ratio, part, summary_query, spec) for part in parts), strict=True
    )
    assert all(x.dtype == queries.summaries.dtype for x in (*dparts, *dsummary_queries))
    return out, dq, list(dparts), sum(dsummary_queries)


def of_shards(stages: Any, inputs: Inputs, grid: ChunkGrid, spec: AttentionSpec) -> dict[str, torch.Tensor]:
    """Output and gradients of three shards, each with its own part and those of the others."""
    c, places = inputs.summary_query, shards_of(grid, 3)
    parts: list[Part | Blocks] = [Part(inputs.k[:, tokens], inputs.v[:, tokens], chunks) for chunks, tokens in places]
    summaries = stages.summarize(inputs.k, grid, c, spec)
    for part, (chunks, _) in zip(parts, places, strict=True):
        torch.testing.assert_close(stages.summarize(part.k, chunks, c, spec), summaries[:, chunks.ids])

    actual = zeros(inputs, summaries.dtype)
    for index, (chunks, tokens) in enumerate(places):
        q = inputs.q[:, tokens]
        queries = Queries(q, chunks, summaries, stages.route(q, chunks, summaries, spec))
        order = [index, *(other for other in range(3) if other != index)]
        out, dq, dparts, dc = by_parts(
            stages, queries, inputs.grad[:, tokens], [parts[place] for place in order], c, spec
        )
        actual["output"][:, tokens], actual["q"][:, tokens] = out.to(summaries.dtype), dq.to(summaries.dtype)
        for place, (dk, dv) in zip(order, dparts, strict=True):
            actual["k"][:, places[place][1]] += dk
            actual["v"][:, places[place][1]] += dv
        actual["summary_query"] += dc
    return actual


def of_blocks(stages: Any, inputs: Inputs, grid: ChunkGrid, spec: AttentionSpec) -> tuple[dict[str, torch.Tensor], int]:
    """Output and gradients of two shards, each with its own part and the blocks that it reached elsewhere; and the
    number of blocks that were left out.
    """
    c, n, (batch, _, heads, _) = inputs.summary_query, len(grid), inputs.k.shape
    kv = torch.stack((inputs.k, inputs.v), 1).unflatten(2, (n, C)).permute(0, 4, 2, 1, 3, 5).flatten(0, 2)
    summaries = stages.summarize(inputs.k, grid, c, spec)
    actual = zeros(inputs, summaries.dtype)
    dkv = torch.zeros_like(kv, dtype=summaries.dtype)  # by address
    left_out = 0
    for chunks, tokens in shards_of(grid, 2):
        q = inputs.q[:, tokens]
        queries = Queries(q, chunks, summaries, stages.route(q, chunks, summaries, spec))
        own = Part(inputs.k[:, tokens], inputs.v[:, tokens], chunks)
        reached = stages.reached(queries.routing, chunks, n, spec)
        assert reached.shape == (batch, heads, n)
        assert reached.dtype == torch.bool
        if spec.attend_first_chunk:
            assert reached[:, :, chunks.firsts[chunks.ids > chunks.firsts]].all()
        reached[:, :, chunks.ids] = False
        addresses = reached.flatten().nonzero().flatten()
        left_out += (n - len(chunks)) * heads * batch - len(addresses)
        addresses = addresses[torch.randperm(len(addresses), device=DEVICE)]
        blocks = Blocks(kv[addresses].clone(), addresses)
        out, dq, (down, dblocks), dc = by_parts(stages, queries, inputs.grad[:, tokens], [own, blocks], c, spec)
        assert dblocks.shape == blocks.kv.shape
        actual["output"][:, tokens], actual["q"][:, tokens] = out.to(summaries.dtype), dq.to(summaries.dtype)
        actual["k"][:, tokens] += down[0]
        actual["v"][:, tokens] += down[1]
        dkv[addresses] += dblocks
        actual["summary_query"] += dc
    dk, dv = dkv.unflatten(0, (batch, heads, n)).permute(3, 0, 2, 4, 1, 5).flatten(2, 3)
    actual["k"] += dk
    actual["v"] += dv
    return actual, left_out


def zeros(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Sums of an output and of all gradients, of which nothing has been added yet."""
    tensors = inputs.q, inputs.q, inputs.k, inputs.v, inputs.summary_query
    return {name: torch.zeros_like(x, dtype=dtype) for name, x in zip(NAMES, tensors, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "sizes", "prior_sigma"),
    [
        ("eager", [7 * C], None),
        ("eager", [7 * C], 1.5),
        ("eager", [70, 1, 5 * C, 0, 90], None),
        ("eager", [70, 1, 5 * C, 0, 90], 1.5),
        ("triton float32", [4 * C], None),
        ("triton float32", [40, 1, 3 * C, 0, 9], 1.5),
        ("triton float16", [40, 1, 3 * C, 0, 9], None),
    ],
)
def test_shards_together_are_the_whole(backend: str, sizes: list[int], prior_sigma: float | None) -> None:
    stages, dtype, tolerance, group = BACKENDS[backend]
    bounds = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).to(torch.int32)
    call = {"chunk_size": C, "alpha": 1.5, "routing_scale": 6.0, "prior_sigma": prior_sigma, "softmax_scale": None}
    inputs = clear_inputs(sum(sizes), call, cu_seqlens=bounds, kv_heads=1, group=group, dtype=dtype)
    expected = output_and_gradients(
        dash_attention, inputs.to(torch.float64), backend="eager", cu_seqlens=bounds, **call
    )

    grid, spec = ChunkGrid.packed(bounds.tolist(), C), AttentionSpec(**call).for_head_dim(inputs.q.shape[-1])
    assert_near(of_shards(stages, inputs, grid, spec), expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "prior_sigma"), [(1, None), (2, 1.5)])
def test_blocks_that_were_reached_stand_for_the_rest_of_the_sequence(
    backend: str, batch: int, prior_sigma: float | None
) -> None:
    """Parts of the selective exchange: the own one, and single heads' chunks that any query selected."""
    stages, dtype, tolerance, group = BACKENDS[backend]
    call = {"chunk_size": C, "alpha": 1.5, "routing_scale": 20.0, "prior_sigma": prior_sigma, "softmax_scale": None}
    chunks_in_all = 6 if backend == "eager" else 5
    # Gradients of log P go with 1 / margin, and at this routing_scale scores have errors of 1e-6 in float32.
    inputs = clear_inputs(chunks_in_all * C, call, margin=1e-3, kv_heads=2, group=group, batch=batch, dtype=dtype)
    expected = output_and_gradients(dash_attention, inputs.to(torch.float64), backend="eager", **call)
    grid = ChunkGrid.whole_sequence(chunks_in_all * C, C)
    actual, left_out = of_blocks(stages, inputs, grid, AttentionSpec(**call).for_head_dim(inputs.q.shape[-1]))
    assert left_out > 0, "every block was reached: nothing is tested"
    assert_near(actual, expected, tolerance)


def test_nothing_but_the_own_part_is_needed_without_a_remote_block() -> None:
    """A rank that asks for nothing gets no block, and the last part is empty."""
    inputs = random_inputs(C, kv_heads=1, group=2, dtype=torch.float32)
    call = {"chunk_size": C, "alpha": 1.5, "routing_scale": 1.0, "prior_sigma": None, "softmax_scale": None}
    expected = output_and_gradients(dash_attention, inputs.to(torch.float64), backend="eager", **call)
    spec = AttentionSpec(**call).for_head_dim(inputs.q.shape[-1])
    grid = ChunkGrid.whole_sequence(C, C)
    none = Blocks(inputs.k.new_empty(0, 2, C, 32), torch.empty(0, dtype=torch.int64, device=DEVICE))
    for stages in (eager, triton_backend):
        summaries = stages.summarize(inputs.k, grid, inputs.summary_query, spec)
        queries = Queries(inputs.q, grid, summaries, stages.route(inputs.q, grid, summaries, spec))
        assert not stages.reached(queries.routing, grid, 1, spec).any()
        own = Part(inputs.k, inputs.v, grid)
        out, dq, (dkv, dblocks), dc = by_parts(stages, queries, inputs.grad, [own, none], inputs.summary_query, spec)
        assert len(dblocks) == 0
        actual = {"output": out, "q": dq, "k": dkv[0], "v": dkv[1], "summary_query": dc}
        assert_near(actual, expected, 2e-5)

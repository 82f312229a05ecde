"""The stages over shards of a sequence, as the ranks of a group hold them, against the call on all of it."""

from types import ModuleType

import pytest
import torch
from attention_inputs import DEVICE, assert_near, clear_inputs, output_and_gradients, random_inputs

from dash_kernels import dash_attention, eager, triton_backend
from dash_kernels.arguments import check_arguments
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import GradientSums, Part

C = 16
# The stages, what they run in, how close they must come, and the query heads of a KV head.
BACKENDS = {
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
        shards.append((ChunkGrid(grid.ids[slots], grid.lengths[slots], grid.firsts[slots]), torch.cat(tokens)))
    return shards


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

    c = inputs.summary_query
    spec = check_arguments(inputs.q, inputs.k, inputs.v, c, **call)
    grid = ChunkGrid.packed(bounds.tolist(), C)
    places = shards_of(grid, 3)
    parts = [Part(inputs.k[:, tokens], inputs.v[:, tokens], chunks, whole=False) for chunks, tokens in places]
    summaries = stages.summarize(inputs.k, grid, c, spec)
    for part in parts:
        torch.testing.assert_close(stages.summarize(part.k, part.chunks, c, spec), summaries[:, part.chunks.ids])

    actual = {name: torch.zeros_like(wanted, dtype=summaries.dtype) for name, wanted in expected.items()}
    dsummaries = torch.zeros_like(summaries)
    dkv = [torch.zeros(2, *part.k.shape, dtype=summaries.dtype, device=DEVICE) for part in parts]
    for chunks, tokens in places:
        q, grad = inputs.q[:, tokens], inputs.grad[:, tokens]
        routing = stages.route(q, chunks, summaries, spec)
        outs, sums_of_exp = zip(
            *(stages.attend(q, chunks, part, summaries, routing, spec) for part in parts), strict=True
        )
        assert all(out.dtype == summaries.dtype for out in outs)
        lse = torch.stack(sums_of_exp).logsumexp(0)
        out = sum((part * (own - lse).exp().unsqueeze(-1) for part, own in zip(outs, sums_of_exp, strict=True)))
        sums = GradientSums.zeros(q, summaries)
        delta = stages.row_dots(grad, out)
        for part, total in zip(parts, dkv, strict=True):
            contribution, dc = stages.attend_backward(
                grad, q, chunks, part, c, summaries, routing, lse, delta, spec, sums
            )
            total += contribution
            actual["summary_query"] += dc
        assert not sums.dsummaries.any()
        stages.route_backward(q, chunks, summaries, routing, spec, sums)
        dsummaries += sums.dsummaries
        actual["output"][:, tokens], actual["q"][:, tokens] = out, sums.dq
    for (chunks, tokens), part, total in zip(places, parts, dkv, strict=True):
        actual["summary_query"] += stages.summarize_backward(
            dsummaries[:, chunks.ids], part.k, chunks, c, spec, total[0]
        )
        actual["k"][:, tokens], actual["v"][:, tokens] = total
    assert_near(actual, expected, tolerance)


@pytest.mark.parametrize(("stages", "dtype", "tolerance", "group"), BACKENDS.values(), ids=BACKENDS.keys())
def test_queries_of_a_shard_against_everything_in_another_order(
    stages: ModuleType, dtype: torch.dtype, tolerance: float, group: int
) -> None:
    """What the all-gather exchange does: the part is whole, its chunks in the order of the shards."""
    inputs = random_inputs(6 * C, kv_heads=1, group=group, batch=2, dtype=dtype)
    call = {"chunk_size": C, "alpha": 1.5, "routing_scale": 6.0, "prior_sigma": None, "softmax_scale": None}
    expected = output_and_gradients(dash_attention, inputs.to(torch.float64), backend="eager", **call)
    c = inputs.summary_query
    spec = check_arguments(inputs.q, inputs.k, inputs.v, c, **call)
    grid = ChunkGrid.whole_sequence(6 * C, C)
    places = shards_of(grid, 3)
    order = torch.cat([tokens for _, tokens in places])
    ids = torch.cat([chunks.ids for chunks, _ in places])
    part = Part(inputs.k[:, order], inputs.v[:, order], ChunkGrid.complete(ids.tolist(), C), whole=True)
    summaries = stages.summarize(inputs.k, grid, c, spec)
    actual = {name: torch.zeros_like(wanted, dtype=summaries.dtype) for name, wanted in expected.items()}
    for chunks, tokens in places:
        q, grad = inputs.q[:, tokens], inputs.grad[:, tokens]
        routing = stages.route(q, chunks, summaries, spec)
        out, lse = stages.attend(q, chunks, part, summaries, routing, spec)
        assert out.dtype == q.dtype
        dq, dkv, dc = stages.backward_whole(grad, q, chunks, part, c, summaries, routing, out, lse, spec)
        assert (dq.dtype, dkv.dtype, dc.dtype) == (q.dtype, summaries.dtype, summaries.dtype)
        actual["output"][:, tokens], actual["q"][:, tokens] = out.to(summaries.dtype), dq.to(summaries.dtype)
        actual["k"][:, order] += dkv[0]
        actual["v"][:, order] += dkv[1]
        actual["summary_query"] += dc
    assert_near(actual, expected, tolerance)

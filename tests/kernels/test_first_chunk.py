"""Attention to the first chunk of every document beside the routed ones, against the reference and part by part."""

from typing import Any

import pytest
import torch

from dash_kernels import dash_attention, eager, reference_dash_attention
from dash_kernels import triton as triton_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.first_chunk import FirstChunkStages
from dash_kernels.selection import TopChunks
from dash_kernels.selection_counts import selection_counts
from dash_kernels.spec import AttentionSpec, Queries
from tests.kernels.attention_inputs import (
    DEVICE,
    assert_near,
    clear_inputs,
    output_and_gradients,
    random_inputs,
    relative_errors,
)
from tests.kernels.test_parts import BACKENDS, of_blocks, of_shards

C = 16
PACKED = [70, 1, 5 * C, 0, C, 90]


def bounds_of(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes], device=DEVICE).cumsum(0).to(torch.int32)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "chunk_size": C,
        "alpha": 1.5,
        "routing_scale": 6.0,
        "prior_sigma": None,
        "softmax_scale": None,
        "attend_first_chunk": True,
        **changes,
    }


@pytest.mark.parametrize("sizes", [[1], [C], [C + 1], [2 * C], [7 * C + 5], PACKED], ids=str)
@pytest.mark.parametrize(("alpha", "prior_sigma"), [(1.5, None), (1.5, 1.5), (1.8, None), (2.0, 1e6)])
def test_eager_equals_the_reference(sizes: list[int], alpha: float, prior_sigma: float | None) -> None:
    inputs, bounds = random_inputs(sum(sizes)), bounds_of(sizes)
    call = settings(alpha=alpha, prior_sigma=prior_sigma)
    expected = output_and_gradients(reference_dash_attention, inputs, cu_seqlens=bounds, **call)
    actual = output_and_gradients(dash_attention, inputs, backend="eager", cu_seqlens=bounds, **call)
    assert_near(actual, expected, 1e-10)


def test_a_batch_equals_the_reference() -> None:
    inputs, call = random_inputs(6 * C + 3, batch=2), settings(prior_sigma=2.0)
    expected = output_and_gradients(reference_dash_attention, inputs, **call)
    assert_near(output_and_gradients(dash_attention, inputs, backend="eager", **call), expected, 1e-10)


def test_three_chunks_are_dense_attention() -> None:
    """The middle chunk is the only candidate of the last one's queries: its probability is 1, and no bias is left."""
    inputs = random_inputs(3 * C - 5)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    tensors = inputs.q, inputs.k, inputs.v, inputs.summary_query
    out, routing = reference_dash_attention(*tensors, **settings())
    torch.testing.assert_close(out, dense)
    assert routing.density == 1
    without, _ = reference_dash_attention(*tensors, **settings(attend_first_chunk=False))
    assert (without - dense).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[C], [4 * C + 5], [40, 1, 3 * C, 0, C, 9]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 3e-3)])
@pytest.mark.parametrize("prior_sigma", [None, 1.5])
def test_triton_equals_the_reference(
    sizes: list[int], dtype: torch.dtype, tolerance: float, prior_sigma: float | None
) -> None:
    bounds, call = bounds_of(sizes), settings(prior_sigma=prior_sigma)
    inputs = clear_inputs(int(bounds[-1]), call, cu_seqlens=bounds, kv_heads=2, group=2, dtype=dtype)
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), cu_seqlens=bounds, **call)
    actual = output_and_gradients(dash_attention, inputs, backend="triton", cu_seqlens=bounds, **call)
    assert_near(actual, expected, tolerance)


@pytest.mark.slow
def test_triton_of_a_batch() -> None:
    call = settings(prior_sigma=1.5)
    inputs = clear_inputs(4 * C + 3, call, batch=2, kv_heads=2, group=2, dtype=torch.float32)
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    assert_near(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[31 * C, C, C, 2 * C], [2 * C] * 18], ids=["chunks", "documents"])
def test_triton_of_several_words(sizes: list[int]) -> None:
    """Documents that begin at chunks 31, 32 and 33, the ends of a word with a bit per chunk; and more documents than
    their numbers have bits in a word.
    """
    bounds, call = bounds_of(sizes), settings(routing_scale=40.0)
    # Gradients of log P go with 1 / margin, and at this routing_scale scores have errors of 1e-6 in float32.
    inputs = clear_inputs(
        int(bounds[-1]), call, cu_seqlens=bounds, margin=1e-3, kv_heads=1, group=1, head_dim=16, dtype=torch.float32
    )
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), cu_seqlens=bounds, **call)
    actual = output_and_gradients(dash_attention, inputs, backend="triton", cu_seqlens=bounds, **call)
    assert_near(actual, expected, 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: bfloat16 is wrong in Triton's interpreter")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_is_as_exact_as_an_eager_implementation(head_dim: int) -> None:
    """On Hopper, with the kernels of specialised warps."""
    bounds, call = bounds_of([1024, 64, 1984]), settings(chunk_size=64, routing_scale=2.0)
    inputs = random_inputs(3072, kv_heads=2, group=4, head_dim=head_dim, dtype=torch.bfloat16)
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), cu_seqlens=bounds, **call)
    ours = output_and_gradients(dash_attention, inputs, cu_seqlens=bounds, backend="triton", **call)
    eager = output_and_gradients(reference_dash_attention, inputs, cu_seqlens=bounds, **call)
    wanted = relative_errors(eager, expected)
    for name, error in relative_errors(ours, expected).items():
        assert error <= 2 * wanted[name], (name, error, wanted)


@pytest.mark.parametrize(
    ("backend", "sizes", "prior_sigma"),
    [
        ("eager", [7 * C], None),
        ("eager", PACKED, 1.5),
        ("eager", [C, C, 2 * C], None),
        pytest.param("triton float32", [4 * C], 1.5, marks=pytest.mark.slow),
        pytest.param("triton float32", [C, C, 2 * C], None, marks=pytest.mark.slow),
        pytest.param("triton float16", [40, 1, 3 * C, 0, 9], None, marks=pytest.mark.slow),
    ],
)
def test_shards_together_are_the_whole(backend: str, sizes: list[int], prior_sigma: float | None) -> None:
    module, dtype, tolerance, group = BACKENDS[backend]
    stages: Any = FirstChunkStages(module)
    bounds, call = bounds_of(sizes), settings(prior_sigma=prior_sigma)
    inputs = clear_inputs(int(bounds[-1]), call, cu_seqlens=bounds, kv_heads=1, group=group, dtype=dtype)
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), cu_seqlens=bounds, **call)
    grid, spec = ChunkGrid.packed(bounds.tolist(), C), AttentionSpec(**call).for_head_dim(inputs.q.shape[-1])
    assert_near(of_shards(stages, inputs, grid, spec), expected, tolerance)


@pytest.mark.parametrize(("sizes", "batch"), [([4 * C, C, 3 * C], 1), ([6 * C], 2)], ids=str)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton float32", marks=pytest.mark.slow)])
def test_blocks_that_were_reached_stand_for_the_rest_of_the_sequence(
    backend: str, sizes: list[int], batch: int
) -> None:
    """Also where a block of a document's first chunk is the rank's own, or no query asks for it."""
    module, dtype, tolerance, group = BACKENDS[backend]
    stages: Any = FirstChunkStages(module)
    bounds, call = bounds_of(sizes), settings(routing_scale=20.0)
    inputs = clear_inputs(
        int(bounds[-1]), call, cu_seqlens=bounds, margin=1e-3, batch=batch, kv_heads=2, group=group, dtype=dtype
    )
    packed = {} if len(sizes) == 1 else {"cu_seqlens": bounds}
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call, **packed)
    grid, spec = ChunkGrid.packed(bounds.tolist(), C), AttentionSpec(**call).for_head_dim(inputs.q.shape[-1])
    assert_near(of_blocks(stages, inputs, grid, spec)[0], expected, tolerance)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_statistics_count_the_first_chunk(backend: str) -> None:
    bounds, call = bounds_of([5 * C, C, 40]), settings(routing_scale=20.0)
    inputs = clear_inputs(int(bounds[-1]), call, cu_seqlens=bounds, kv_heads=2, group=2, dtype=torch.float32)
    tensors = inputs.q, inputs.k, inputs.v, inputs.summary_query
    _, wanted = reference_dash_attention(*(x.double() for x in tensors), cu_seqlens=bounds, **call)
    _, routing = dash_attention(*tensors, cu_seqlens=bounds, backend=backend, return_routing=True, **call)
    assert torch.equal(routing.selected_per_token, wanted.selected_per_token)
    assert routing.density == wanted.density < 1

    spec = AttentionSpec(**call).for_head_dim(inputs.q.shape[-1])
    stages: Any = FirstChunkStages(eager if backend == "eager" else triton_backend)
    grid = ChunkGrid.packed(bounds.tolist(), C)
    summaries = stages.summarize(inputs.k, grid, inputs.summary_query, spec)
    queries = Queries(inputs.q, grid, summaries, stages.route(inputs.q, grid, summaries, spec))
    selected, available = selection_counts(queries, spec, len(grid))
    assert int(selected.sum()) == int(wanted.selected_per_token.sum())
    assert int(available.sum()) == int(wanted.available_per_token.sum()) * 2
    assert selected[:5, 0].tolist() == [2 * C] * 5
    assert selected[6:, 6].tolist() == [2 * C, 2 * C, 2 * (40 - 2 * C)]


@pytest.mark.parametrize(
    "changes", [{"attend_first_chunk": 1}, {"attend_first_chunk": True, "selection": TopChunks(3)}]
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attend_first_chunk is"):
        AttentionSpec(**changes)

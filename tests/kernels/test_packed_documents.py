"""cu_seqlens: each document is computed as a sequence of its own, and anything else is refused."""

from typing import Any
from unittest import mock

import pytest
import torch

from dash_kernels import ChunkGrid, arguments, dash_attention, reference_dash_attention
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
DOCUMENTS = {
    "single tokens": [1, 1, 1, 1],
    "single tokens between long ones": [50, 1, 1, 40, 1],
    "empty first": [0, 40, 33],
    "empty in the middle": [40, 0, 0, 33],
    "empty last": [40, 33, 0],
    "a chunk each": [C, C, C],
    "whole chunks": [3 * C, 2 * C, 4 * C],
    "a token more or less than whole chunks": [2 * C + 1, 2 * C - 1, 3 * C + 1, C - 1],
    "one document": [90],
}


def offsets(sizes: list[int], device: str = DEVICE) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)


def eager(inputs: Inputs, **call: Any) -> dict[str, torch.Tensor]:
    return output_and_gradients(dash_attention, inputs, backend="eager", **call)


@pytest.mark.parametrize(("prior_sigma", "alpha"), [(None, 1.5), (1.5, 1.5), (None, 2.0), (1.5, 1.3)])
@pytest.mark.parametrize("sizes", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_equals_the_reference(sizes: list[int], prior_sigma: float | None, alpha: float) -> None:
    inputs = random_inputs(sum(sizes))
    call = {"chunk_size": C, "prior_sigma": prior_sigma, "alpha": alpha, "routing_scale": 3.0}
    call["cu_seqlens"] = offsets(sizes)
    assert_near(eager(inputs, **call), output_and_gradients(reference_dash_attention, inputs, **call), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("prior_sigma", [None, 1.5])
@pytest.mark.parametrize("sizes", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_triton_equals_the_reference(sizes: list[int], prior_sigma: float | None) -> None:
    bounds = offsets(sizes)
    call = {"chunk_size": C, "prior_sigma": prior_sigma, "routing_scale": 3.0}
    # float16 takes tensor maps, float32 does not
    dtype, tolerance = (torch.float16, 3e-3) if prior_sigma is None else (torch.float32, 2e-5)
    inputs = clear_inputs(sum(sizes), call, cu_seqlens=bounds, kv_heads=1, group=1, head_dim=16, dtype=dtype)
    call["cu_seqlens"] = bounds
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    assert_near(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected, tolerance)


@pytest.mark.parametrize(("backend", "dtype"), [("eager", torch.float64), ("triton", torch.float32)])
def test_statistics_count_the_chunks_of_the_own_document(backend: str, dtype: torch.dtype) -> None:
    call = {"chunk_size": C, "routing_scale": 10.0}
    bounds = offsets([40, 0, 1, 89])
    inputs = clear_inputs(130, call, cu_seqlens=bounds, kv_heads=1, dtype=dtype)
    tensors = inputs.q, inputs.k, inputs.v, inputs.summary_query
    call["cu_seqlens"] = bounds
    _, routing = dash_attention(*tensors, backend=backend, return_routing=True, **call)
    _, wanted = reference_dash_attention(*(x.double() for x in tensors), **call)
    assert torch.equal(routing.selected_per_token, wanted.selected_per_token)
    for statistics in (routing, wanted):
        available = [1] * C + [2] * C + [3] * 8 + [1] + [1] * C + [2] * C + [3] * C + [4] * C + [5] * C + [6] * 9
        assert statistics.available_per_token.tolist() == available
        assert statistics.available_per_token.dtype == torch.int32
    assert routing.density == wanted.density < 1


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_one_document_is_no_cu_seqlens_bit_for_bit(backend: str) -> None:
    inputs = random_inputs(75, kv_heads=1, group=2, dtype=torch.float32)
    call = {"backend": backend, "chunk_size": C}
    expected = output_and_gradients(dash_attention, inputs, **call)
    for device in {"cpu", DEVICE}:
        actual = output_and_gradients(dash_attention, inputs, cu_seqlens=offsets([75], device), **call)
        assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def test_documents_are_the_sequences_they_are_computed_alone() -> None:
    sizes = [70, 33]
    inputs = random_inputs(sum(sizes))
    packed = eager(inputs, chunk_size=C, cu_seqlens=offsets(sizes))
    alone = []
    for tokens in (slice(0, 70), slice(70, 103)):
        q, k, v, grad = (x[:, tokens] for x in (inputs.q, inputs.k, inputs.v, inputs.grad))
        alone.append(eager(Inputs(q, k, v, inputs.summary_query, grad), chunk_size=C))
    for name in NAMES[:-1]:
        torch.testing.assert_close(packed[name], torch.cat([document[name] for document in alone], dim=1))
    total = alone[0]["summary_query"] + alone[1]["summary_query"]
    torch.testing.assert_close(packed["summary_query"], total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dtype", "value"),
    [
        ("eager", torch.float32, 7.0),
        ("eager", torch.float32, float("nan")),
        ("triton", torch.float32, float("nan")),
        ("triton", torch.float16, float("nan")),  # through tensor maps
    ],
)
def test_a_changed_document_changes_nothing_in_the_others(backend: str, dtype: torch.dtype, value: float) -> None:
    sizes = [20, 35, 17]
    inputs = random_inputs(sum(sizes), kv_heads=1, group=1, dtype=dtype)
    call = {"chunk_size": C, "prior_sigma": 1.5, "cu_seqlens": offsets(sizes), "backend": backend}
    before = output_and_gradients(dash_attention, inputs, **call)
    inside = torch.zeros(sum(sizes), dtype=torch.bool, device=DEVICE)
    inside[20:55] = True
    for token in (20, 40, 54):  # first, in a complete chunk, last
        k, v = inputs.k.clone(), inputs.v.clone()
        k[:, token], v[:, token] = value, value
        after = output_and_gradients(dash_attention, Inputs(inputs.q, k, v, inputs.summary_query, inputs.grad), **call)
        for name in NAMES[:-1]:
            assert torch.equal(after[name][:, ~inside], before[name][:, ~inside]), (name, token)
            assert not torch.equal(after[name][:, inside], before[name][:, inside]), (name, token)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 40], r"cu_seqlens is of type list: give an int32 tensor \[documents \+ 1\]"),
        (torch.tensor([0, 40]), r"cu_seqlens has dtype torch.int64: give torch.int32"),
        (torch.tensor([0.0, 40.0]), r"cu_seqlens has dtype torch.float32"),
        (torch.tensor([[0, 40]], dtype=torch.int32), r"cu_seqlens has shape \(1, 2\): give \[documents \+ 1\]"),
        (torch.tensor([40], dtype=torch.int32), r"cu_seqlens has shape \(1,\): .* at least 2 entries"),
        (torch.zeros(2, dtype=torch.int32, device="meta"), r"cu_seqlens is on meta: put it on the CPU or on q's"),
        (torch.tensor([1, 40], dtype=torch.int32), r"cu_seqlens starts at 1: its first entry must be 0"),
        (torch.tensor([0, 30, 20, 40], dtype=torch.int32), r"cu_seqlens falls from 30 to 20 at entry 2"),
        (torch.tensor([0, 39], dtype=torch.int32), r"cu_seqlens ends at 39 but the sequence has 40 tokens"),
        (torch.tensor([0, 41], dtype=torch.int32), r"cu_seqlens ends at 41 but the sequence has 40 tokens"),
    ],
)
def test_refusals(cu_seqlens: Any, message: str) -> None:
    inputs = random_inputs(40, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        dash_attention(inputs.q, inputs.k, inputs.v, inputs.summary_query, chunk_size=C, cu_seqlens=cu_seqlens)


def test_batches_are_refused() -> None:
    inputs = random_inputs(40, batch=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"q of shape \(2, 40, 8, 32\): packed documents need batch 1"):
        dash_attention(inputs.q, inputs.k, inputs.v, inputs.summary_query, chunk_size=C, cu_seqlens=offsets([40]))


def test_a_grid_that_was_built_once_stands_for_cu_seqlens() -> None:
    inputs = random_inputs(60)
    tensors = inputs.q, inputs.k, inputs.v, inputs.summary_query
    cu_seqlens = offsets([20, 40])
    grid = ChunkGrid.packed(cu_seqlens.tolist(), C)
    expected = dash_attention(*tensors, chunk_size=C, backend="eager", cu_seqlens=cu_seqlens)
    with mock.patch.object(arguments, "check_cu_seqlens", wraps=arguments.check_cu_seqlens) as check:
        for _ in range(2):
            assert torch.equal(dash_attention(*tensors, chunk_size=C, backend="eager", chunks=grid), expected)
        assert check.call_count == 0
    with pytest.raises(ValueError, match="chunks has 60 tokens but the sequence 59"):
        dash_attention(*(x[:, :59] for x in tensors[:3]), tensors[3], chunk_size=C, chunks=grid)
    with pytest.raises(ValueError, match="chunks has one of 32 tokens: build it with chunk_size 16"):
        dash_attention(*tensors, chunk_size=C, chunks=ChunkGrid.packed([0, 20, 60], 2 * C))
    with pytest.raises(ValueError, match="chunks and cu_seqlens were both given"):
        dash_attention(*tensors, chunk_size=C, chunks=grid, cu_seqlens=cu_seqlens)

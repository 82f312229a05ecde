"""Native Sparse Attention: every backend against the float64 reference, and each branch at its edges."""

import dataclasses

import pytest
import torch

from dash_kernels import AttentionSpec, ChunkGrid, dash_attention
from dash_kernels.compression import CompressionWeights, compress, strides_of
from dash_kernels.nsa import nsa_attention
from dash_kernels.selection import BLOCK, NSA, TopChunks
from tests.kernels.nsa_inputs import (
    NAMES,
    NSAInputs,
    arguments_of,
    assert_found,
    expected_of,
    found_of,
    random_nsa_inputs,
)

C = 16
DOCUMENTS = (0, 1, 64, 64, 70, 187)
SPEC = AttentionSpec(C, selection=NSA(4))
WINDOW = 19


def cu_seqlens_of(borders: tuple[int, ...] | None) -> torch.Tensor | None:
    return None if borders is None else torch.tensor(borders, dtype=torch.int32)


@pytest.mark.parametrize("borders", [None, DOCUMENTS])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_eager_equals_the_reference(borders: tuple[int, ...] | None, group: int) -> None:
    inputs = random_nsa_inputs(187, group=group, kv_heads=1 if group == 16 else 2, batch=1 if borders else 2)
    cu_seqlens = cu_seqlens_of(borders)
    assert_found(
        found_of(inputs, SPEC, WINDOW, cu_seqlens=cu_seqlens), expected_of(inputs, SPEC, WINDOW, cu_seqlens), 1e-12
    )


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 48])
def test_lengths_around_the_first_blocks(tokens: int) -> None:
    inputs = random_nsa_inputs(tokens)
    assert_found(found_of(inputs, SPEC, WINDOW), expected_of(inputs, SPEC, WINDOW), 1e-12)


@pytest.mark.parametrize("borders", [None, (0, 31, 130, 331)])
@pytest.mark.parametrize("chunk_size", [32, 64])
def test_longer_chunks(chunk_size: int, borders: tuple[int, ...] | None) -> None:
    """Several blocks lie in a chunk, and one overlaps the next as well."""
    spec = AttentionSpec(chunk_size, selection=NSA(3, first_chunks=0, local_chunks=1))
    inputs = random_nsa_inputs(331, kv_heads=1)
    cu_seqlens = cu_seqlens_of(borders)
    assert_found(
        found_of(inputs, spec, WINDOW, cu_seqlens=cu_seqlens), expected_of(inputs, spec, WINDOW, cu_seqlens), 1e-12
    )


def test_layers_without_positions() -> None:
    inputs = random_nsa_inputs(187, rotated=False)
    assert_found(found_of(inputs, SPEC, WINDOW), expected_of(inputs, SPEC, WINDOW), 1e-12)


def test_blocks_of_queries_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, cu_seqlens = random_nsa_inputs(187), cu_seqlens_of(DOCUMENTS)
    whole = found_of(inputs, SPEC, WINDOW, cu_seqlens=cu_seqlens)
    monkeypatch.setattr("dash_kernels.compressed_attention.MAX_SCORES", 1)
    monkeypatch.setattr("dash_kernels.listed_routing.MAX_SCORES", 1)
    assert_found(found_of(inputs, SPEC, WINDOW, cu_seqlens=cu_seqlens), whole, 1e-12)


def test_equal_scores_give_the_first_chunks() -> None:
    """With queries of zeros every block has the same probability: whole chunks in the middle are equal."""
    inputs = random_nsa_inputs(7 * C)
    q, *others = inputs.tensors
    equal = NSAInputs((torch.zeros_like(q), *others), inputs.angles, inputs.grad)
    spec = AttentionSpec(C, selection=NSA(4, first_chunks=0, local_chunks=1))
    found, expected = found_of(equal, spec, WINDOW), expected_of(equal, spec, WINDOW)
    assert_found(found, expected, 1e-12)


def test_a_block_is_compressed_whatever_lies_around_it() -> None:
    x = torch.randn(1, 80, 2, 8, dtype=torch.float64)
    weights = CompressionWeights(
        *(torch.randn(shape, dtype=torch.float64) for shape in ((2, 32, 8), (2, 256, 3), (2, 3, 8)))
    )
    grid = ChunkGrid.whole_sequence(80, C)
    found = compress(strides_of(x, grid, SPEC), weights)
    for stride in range(1, 5):
        block = x[0, 16 * stride - 16 : 16 * stride + 16]  # [32, Hkv, D]
        for head in range(2):
            hidden = (block[:, head] + weights.positions[head]).flatten() @ weights.inner[head]
            torch.testing.assert_close(found[0, stride, head], hidden.relu() @ weights.outer[head])


def test_the_future_and_other_documents_reach_nothing() -> None:
    """NaN in one document, and in what follows a token, stays there: outputs and gradients."""
    inputs = random_nsa_inputs(192)
    borders = torch.tensor((0, 64, 128, 192), dtype=torch.int32)
    clean = found_of(inputs, SPEC, WINDOW, cu_seqlens=borders)
    spoilt = [x.clone() for x in inputs.tensors]
    for name, x in zip(NAMES, spoilt, strict=True):
        if name in ("q", "k", "v", "compressed_k", "compressed_v", "window_k", "window_v"):
            x[:, 64:128] = torch.nan
    found = found_of(NSAInputs(tuple(spoilt), inputs.angles, inputs.grad), SPEC, WINDOW, cu_seqlens=borders)
    for tokens in (slice(0, 64), slice(128, 192)):
        for name in ("output", "q", "k", "v", "compressed_k", "compressed_v", "window_k", "window_v", "gates"):
            torch.testing.assert_close(found[name][:, tokens], clean[name][:, tokens], rtol=1e-12, atol=1e-12)
    for token in (40, 100, 150):
        changed = [x.clone() for x in inputs.tensors]
        for x in (*changed[:3], *changed[4:9]):
            x[:, token] += 1
        out = nsa_attention(*arguments_of(tuple(changed), inputs.angles), spec=SPEC, window=WINDOW)
        before = nsa_attention(*arguments_of(inputs.tensors, inputs.angles), spec=SPEC, window=WINDOW)
        assert torch.equal(out[:, :token], before[:, :token])
        assert not torch.equal(out[:, token:], before[:, token:])


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_a_closed_gate_leaves_its_branch_without_gradient(gate: int) -> None:
    inputs = random_nsa_inputs(100)
    inputs.tensors[8][..., gate] = 0
    found = found_of(inputs, SPEC, WINDOW)
    of_branch = (
        {"compressed_k", "compressed_v", *NAMES[9:]},
        {"k", "v"},
        {"window_k", "window_v"},
    )
    zeros = {name for name, x in found.items() if not x.any()}
    assert zeros == of_branch[gate] | {"summary_query"}


@pytest.mark.parametrize(
    ("dtype", "tolerance", "group", "borders"),
    [(torch.float32, 2e-5, 2, None), (torch.float32, 2e-5, 3, (0, 1, 64, 64, 70, 150))],
)
def test_triton_equals_the_reference(
    dtype: torch.dtype, tolerance: float, group: int, borders: tuple[int, ...] | None
) -> None:
    inputs = random_nsa_inputs(borders[-1] if borders else 150, kv_heads=1, group=group, head_dim=32).to(dtype)
    cu_seqlens = cu_seqlens_of(borders)
    found = found_of(inputs, SPEC, WINDOW, cu_seqlens=cu_seqlens, backend="triton")
    assert_found(found, expected_of(inputs, SPEC, WINDOW, cu_seqlens), tolerance)


def test_bfloat16_is_near_the_reference_of_the_same_inputs() -> None:
    """All chunks are selected, since compressed keys, which are rounded, may nearly tie. A rounded hidden number on the
    other side of ReLU's kink changes all gradients before it.
    """
    spec = AttentionSpec(C, selection=NSA(20))
    inputs = random_nsa_inputs(187, width=64).to(torch.bfloat16)
    found, expected = found_of(inputs, spec, WINDOW), expected_of(inputs, spec, WINDOW)
    beyond_the_kink = ("output", "selected", "k", "v", "window_k", "window_v", "gates", "values' outer")
    assert_found(*({name: x[name] for name in beyond_the_kink} for x in (found, expected)), 2e-2)
    assert_found(found, expected, 0.3)


def test_mistakes_are_named() -> None:
    inputs = random_nsa_inputs(33)
    arguments = arguments_of(inputs.tensors, inputs.angles)
    with pytest.raises(ValueError, match="selection is TopChunks"):
        nsa_attention(*arguments, spec=AttentionSpec(C, selection=TopChunks(3)), window=WINDOW)
    branches, key_weights, value_weights = arguments[4:]
    narrow = dataclasses.replace(branches, gates=branches.gates[..., :2])
    short = dataclasses.replace(branches, window_v=branches.window_v[:, 1:])
    cut = value_weights._replace(positions=value_weights.positions[:, : BLOCK // 2])
    for message, wrong in (
        (r"gates has shape \(1, 33, 4, 2\): give", (narrow, key_weights, value_weights)),
        ("window_v is", (short, key_weights, value_weights)),
        ("value_weights have shapes", (branches, key_weights, cut)),
    ):
        with pytest.raises(ValueError, match=message):
            nsa_attention(*arguments[:4], *wrong, spec=SPEC, window=WINDOW)
    with pytest.raises(ValueError, match="summaries are None, and NSA selects by its compressed keys"):
        dash_attention(*inputs.tensors[:4], spec=SPEC)
    with pytest.raises(ValueError, match="count is 2, and 3 chunks are always selected: 1 first and 1 local ones"):
        NSA(2)

"""The Triton kernels against the float64 reference: through the interpreter without a GPU, compiled with one."""

import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dash_kernels import backend, dash_attention, eager, reference_dash_attention
from dash_kernels import triton as triton_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.device import INTERPRETER, Device
from dash_kernels.spec import Part, Routing
from dash_kernels.triton import lists
from dash_kernels.triton.key_rows import KeyRows
from dash_kernels.triton.launch import launch_options
from dash_kernels.triton.reached import tile_efficiency
from dash_kernels.triton.tiles import TileShape
from tests.kernels.attention_inputs import (
    DEVICE,
    Inputs,
    assert_close,
    assert_near,
    clear_inputs,
    output_and_gradients,
    random_inputs,
    relative_errors,
    routing_gaps,
    spec_of,
)

# (group, head_dim, chunk_size, prior_sigma, tokens): every group, head dim, chunk size and prior mode; tokens never a
# multiple of the chunk
SHAPES = [
    (1, 32, 16, None, 75),
    (2, 96, 32, 1.0, 75),
    (4, 32, 32, 1e6, 90),
    (8, 32, 64, None, 150),
    (16, 64, 16, 1.0, 45),
    (1, 64, 48, 2.0, 130),
    (4, 64, 128, None, 270),
    (16, 128, 32, None, 70),
    (1, 128, 64, 1.0, 140),
    (8, 128, 16, None, 40),
    (3, 96, 16, None, 40),
]
# The same in float16 and whether K and V come through tensor maps
SHAPES_16 = [
    (2, 32, 16, 1.0, 60, True),
    (4, 64, 32, None, 75, True),
    (3, 128, 16, None, 40, True),
    (1, 128, 64, None, 135, True),
    (4, 96, 16, None, 40, False),
    (2, 64, 48, 1.0, 100, False),
    (2, 256, 16, None, 40, False),
]


def check_against_the_reference(inputs: Inputs, tolerance: float, **call: Any) -> None:
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    assert_close(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "head_dim", "chunk_size", "prior_sigma", "seq_len"), SHAPES)
def test_float32_equals_the_float64_reference(
    group: int, head_dim: int, chunk_size: int, prior_sigma: float | None, seq_len: int
) -> None:
    call = {"chunk_size": chunk_size, "prior_sigma": prior_sigma, "routing_scale": 2.0}
    shape = {"kv_heads": 2 if group == 1 else 1, "group": group, "head_dim": head_dim, "dtype": torch.float32}
    check_against_the_reference(clear_inputs(seq_len, call, **shape), 2e-5, **call)


@pytest.mark.parametrize(("group", "head_dim", "chunk_size", "prior_sigma", "seq_len", "maps"), SHAPES_16)
def test_float16_with_and_without_tensor_maps(
    group: int, head_dim: int, chunk_size: int, prior_sigma: float | None, seq_len: int, maps: bool
) -> None:
    call = {"chunk_size": chunk_size, "prior_sigma": prior_sigma, "routing_scale": 2.0}
    inputs = clear_inputs(seq_len, call, kv_heads=1, group=group, head_dim=head_dim, dtype=torch.float16)
    tile = TileShape.of(inputs.q, 1, spec_of(inputs, call))
    grid = ChunkGrid.whole_sequence(seq_len, chunk_size)
    summaries = torch.Size([1, len(grid), 1, head_dim])
    rows = KeyRows.of(Part(inputs.k, inputs.v, grid), summaries, tile)
    maps &= Device.of(inputs.q.device).architecture in ("sm_90", INTERPRETER)
    for kernel in ("attend", "query_gradient"):
        assert rows.maps(tile, launch_options(kernel, inputs.q))[2] == maps
    check_against_the_reference(inputs, 2e-3, **call)


def test_keys_off_the_addresses_of_tensor_maps_are_loaded_one_by_one() -> None:
    call = {"chunk_size": 16, "routing_scale": 2.0}
    inputs = clear_inputs(40, call, kv_heads=1, group=2, head_dim=32, dtype=torch.float16)
    shifted = torch.cat((inputs.k.new_zeros(1), inputs.k.flatten()))[1:].view(inputs.k.shape)
    assert shifted.data_ptr() % 16
    check_against_the_reference(replace(inputs, k=shifted), 2e-3, **call)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transposed_inputs_and_padded_heads_with_a_steep_prior(dtype: torch.dtype) -> None:
    """Batches of 2 as Megatron-core holds them, [T, B, H, D]; three heads per KV head leave a row of a tile unused."""
    call = {"chunk_size": 16, "prior_sigma": 0.05, "routing_scale": 2.0}
    inputs = clear_inputs(40, call, batch=2, kv_heads=2, group=3, dtype=dtype)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 4 else x for x in vars(inputs).values()]
    assert not turned[0].is_contiguous()
    check_against_the_reference(Inputs(*turned), 2e-4 if dtype == torch.float32 else 2e-2, **call)


@pytest.mark.parametrize(("seq_len", "prior_sigma"), [(1, None), (15, 1.0), (16, None), (17, None), (17, 1.0)])
def test_lengths_around_the_first_chunk(seq_len: int, prior_sigma: float | None) -> None:
    """Without an earlier chunk nothing is routed, and the gradient of summary_query is zero."""
    inputs = random_inputs(seq_len, kv_heads=1, dtype=torch.float32)
    call = {"chunk_size": 16, "prior_sigma": prior_sigma}
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    actual = output_and_gradients(dash_attention, inputs, backend="triton", **call)
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name].double(), wanted, atol=1e-5, rtol=1e-5)


C = 16
HOT = 0  # the chunk that every token selects


def unit(inputs: Inputs) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.ones(inputs.q.shape[-1], device=DEVICE, dtype=torch.float64), dim=0)


def as_drawn(inputs: Inputs) -> None:
    pass


def common_offset(inputs: Inputs) -> None:
    """Every score of a row is moved by the same large number."""
    inputs.q[:] += 10 * unit(inputs)
    inputs.k[:] += 30 * unit(inputs)


def equal_keys(inputs: Inputs) -> None:
    """All scores of a row are equal, all chunks selected."""
    inputs.k[:] = inputs.k[:, :1].clone()


def two_kinds_of_keys(inputs: Inputs) -> None:
    """Ties at two levels."""
    inputs.k[:] = inputs.k[:, :1].clone()
    inputs.k.unflatten(1, (-1, C))[:, ::3] *= -1


def one_far_above(inputs: Inputs) -> None:
    """A guess from the scores' mean and spread lies above all of them but one."""
    inputs.q[:] += 8 * unit(inputs)
    inputs.k[:, 2 * C : 3 * C] += 60 * unit(inputs)


def hot_chunk(inputs: Inputs) -> None:
    """One chunk that all tokens select, among others that they select or not."""
    inputs.q[:] += 2 * unit(inputs)
    inputs.k[:, HOT * C : (HOT + 1) * C] += unit(inputs)


def no_queries(inputs: Inputs) -> None:
    """All scores are zero."""
    inputs.q[:] = 0


# routing_scale, how the inputs are changed
SCORES: dict[str, tuple[float, Callable[[Inputs], None]]] = {
    "as drawn": (6.0, as_drawn),
    "dense": (1e-3, as_drawn),
    "very sparse": (30.0, as_drawn),
    "one chunk": (1e4, as_drawn),
    "common offset": (4.0, common_offset),
    "equal keys": (6.0, equal_keys),
    "two kinds of keys": (0.5, two_kinds_of_keys),
    "one far above": (2.0, one_far_above),
    "hot chunk": (6.0, hot_chunk),
    "no queries": (2.0, no_queries),
}


def changed_inputs(scores: str, tokens: int, dtype: torch.dtype, **shape: int) -> tuple[Inputs, dict[str, Any]]:
    routing_scale, change = SCORES[scores]
    inputs = random_inputs(tokens, kv_heads=1, **shape)
    change(inputs)
    return inputs.to(dtype), {"chunk_size": C, "routing_scale": routing_scale, "prior_sigma": None}


def tile_bits(routing: Routing, query_chunks: ChunkGrid, n: int) -> torch.Tensor:
    """For every token whether its tile's bit of a chunk is set, [B, T, Hkv, n]."""
    per_chunk = routing.masks.shape[2] // len(query_chunks)
    bits = ((routing.masks.unsqueeze(-1) >> torch.arange(32, device=DEVICE)) & 1).flatten(-2)[..., :n].bool()
    return bits[:, :, tile_of_tokens(query_chunks, per_chunk)].transpose(1, 2)


def tile_of_tokens(query_chunks: ChunkGrid, per_chunk: int) -> torch.Tensor:
    """Index of the tile that holds a token, [T]."""
    tiles = [
        slot * per_chunk + place // (C // per_chunk)
        for slot, length in enumerate(query_chunks.lengths.tolist())
        for place in range(length)
    ]
    return torch.tensor(tiles, device=DEVICE)


def check_routing(inputs: Inputs, query_chunks: ChunkGrid, key_chunks: ChunkGrid, call: dict[str, Any]) -> float:
    """Thresholds, counts, bits and the efficiency of tiles against the reference's selection; returns the last."""
    spec = spec_of(inputs, call)
    gaps = routing_gaps(inputs, query_chunks, key_chunks, spec)
    allowed = gaps > -torch.inf
    summaries = triton_backend.summarize(inputs.k, key_chunks, inputs.summary_query, spec)
    routing = triton_backend.route(inputs.q, query_chunks, summaries, spec)

    q, exact = inputs.q.double().unflatten(2, (inputs.k.shape[2], -1)), summaries.double()
    x = torch.einsum("bthgd,bnhd->bthgn", q, exact) * (spec.routing_logit_scale / 2)
    # float32 knows a score to some roundings of its largest terms.
    rounding = 5e-6 * (1 + torch.where(allowed, x, 0.0).abs().max().item())
    routed = allowed.any(-1)
    taus = routing.tau.double().unflatten(2, (inputs.k.shape[2], -1))
    wanted = torch.where(allowed, x - gaps, -torch.inf).amax(-1)
    assert ((taus - wanted)[routed].abs() <= rounding).all(), (taus - wanted)[routed].abs().max()
    assert (taus[~routed] == 0).all()

    surely, perhaps = ((gaps > limit).any(3) for limit in (rounding, -rounding))  # [B, T, Hkv, n]
    assert (surely == perhaps).double().mean() > 0.98
    assert (routing.selected > surely.sum(-1)).all()
    assert (routing.selected <= perhaps.sum(-1) + 1).all()

    bits = tile_bits(routing, query_chunks, len(key_chunks))
    assert bits[surely].all()
    per_chunk = routing.masks.shape[2] // len(query_chunks)
    tiles = tile_of_tokens(query_chunks, per_chunk)
    walked = torch.zeros_like(bits)
    for tile in tiles.unique():
        walked[:, tiles == tile] = perhaps[:, tiles == tile].any(1, keepdim=True)
    assert not (bits & allowed.any(3) & ~walked).any()
    efficiency = tile_efficiency(routing, query_chunks, spec)
    if torch.equal(surely, perhaps):
        assert efficiency == pytest.approx((surely.sum() / walked.sum()).item())
    return efficiency


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scores", SCORES)
def test_routing_is_exact(scores: str, dtype: torch.dtype) -> None:
    inputs, call = changed_inputs(scores, 9 * C, dtype, group=2)
    grid = ChunkGrid.whole_sequence(9 * C, C)
    efficiency = check_routing(inputs, grid, grid, call)
    if scores in ("dense", "equal keys", "no queries"):
        assert efficiency == 1
    if scores == "very sparse":
        assert efficiency < 0.9


@pytest.mark.slow
def test_routing_of_packed_documents_and_of_a_shard() -> None:
    """More chunks than a word has bits, documents that begin within one; incomplete chunks; padded heads; batch 2."""
    sizes = [70, 33 * C, 1, 0, 5 * C]
    inputs, call = changed_inputs("as drawn", sum(sizes), torch.float32, group=3)
    packed = ChunkGrid.packed(torch.tensor([0, *sizes]).cumsum(0).tolist(), C)
    check_routing(inputs, packed, packed, call)

    inputs, call = changed_inputs("as drawn", 9 * C, torch.float32, group=3, batch=2)
    ids = [7, 2, 3]
    tokens = torch.cat([torch.arange(C * chunk, C * (chunk + 1)) for chunk in ids])
    shard = Inputs(inputs.q[:, tokens], *list(vars(inputs).values())[1:])
    check_routing(shard, ChunkGrid.complete(ids, C), ChunkGrid.whole_sequence(9 * C, C), call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "prior_sigma"),
    [
        ("dense", None),
        ("very sparse", None),
        ("equal keys", 1e6),
        ("one far above", None),
        ("hot chunk", 1e6),
        ("hot chunk", None),
    ],
)
def test_gradients_of_unusual_scores(scores: str, prior_sigma: float | None) -> None:
    inputs, call = changed_inputs(scores, 5 * C + 5, torch.float32, group=2)
    call["prior_sigma"] = prior_sigma
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    actual = output_and_gradients(dash_attention, inputs, backend="triton", **call)
    # Large keys: the gradient of summary_query is what is left of large terms.
    assert_near(actual, expected, 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[9 * C + 3], [2 * C, 20, 5 * C + 1, 5]], ids=["one document", "packed"])
def test_pieces_and_slabs_of_queries_add_up_to_the_same_bits(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys whose queries come in two pieces, of one slab and of two: pieces are added in their order either way. Every
    token of the first document selects its first chunk.
    """
    inputs, call = changed_inputs("hot chunk", sum(sizes), torch.float32, group=1)
    call["cu_seqlens"] = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    key_gradient = importlib.import_module("dash_kernels.triton.key_gradient")
    results = []
    for piece_tokens, slab_bytes, pieces_of_slabs in ((2**13, 2**28, [1]), (8 * C, 2**28, [2]), (8 * C, 1, [1, 1])):
        monkeypatch.setattr(lists, "LEAST_PIECE_TOKENS", piece_tokens)
        monkeypatch.setattr(lists, "LEAST_PIECE_ROWS", piece_tokens)
        monkeypatch.setattr(lists, "MAX_SLAB_BYTES", slab_bytes)
        made = []
        monkeypatch.setattr(
            key_gradient, "query_bits", lambda *call, made=made: made.append(lists.query_bits(*call)) or made[-1]
        )
        results.append(output_and_gradients(dash_attention, inputs, backend="triton", **call))
        assert [slab.pieces for slab in made] == pieces_of_slabs
    at_once, pieces, slabs = results
    assert_near(at_once, expected, 2e-5)
    for name, tensor in pieces.items():
        assert torch.equal(tensor, slabs[name]), name
        torch.testing.assert_close(tensor, at_once[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_chunks_that_any_query_reached_over_several_words() -> None:
    """40 chunks are two words of bits; a shard of the queries, of which some tiles are padding."""
    call = {"chunk_size": C, "routing_scale": 40.0}
    inputs = clear_inputs(40 * C, call, batch=2, kv_heads=1, group=1, head_dim=16, dtype=torch.float32)
    grid, spec = ChunkGrid.whole_sequence(40 * C, C), spec_of(inputs, call)
    shard = grid.take([3, 17, 38, 39])
    q = inputs.q[:, torch.cat([torch.arange(id * C, id * C + C) for id in shard.ids.tolist()])]
    found = {}
    for name, stages in (("triton", triton_backend), ("eager", eager)):
        summaries = stages.summarize(inputs.k, grid, inputs.summary_query, spec)
        found[name] = stages.reached(stages.route(q, shard, summaries, spec), shard, 40, spec)
    assert torch.equal(found["triton"], found["eager"])
    assert found["eager"][..., 32:].any()
    assert 0 < found["eager"].float().mean() < 0.8


def test_statistics() -> None:
    call = {"chunk_size": C, "routing_scale": 30.0}
    inputs = clear_inputs(70, call, batch=2, kv_heads=1, dtype=torch.float16)
    tensors = inputs.q, inputs.k, inputs.v, inputs.summary_query
    routing = dash_attention(*tensors, backend="triton", return_routing=True, **call)[1]
    wanted = reference_dash_attention(*(x.double() for x in tensors), **call)[1]
    assert (routing.selected_per_token == wanted.selected_per_token).all()
    assert wanted.density < 1


def test_other_gpus_take_what_fits_into_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = Device("sm_80", multiprocessors=108)
    monkeypatch.setattr(Device, "of", lambda device: ampere)
    for dtype, chunk_size, fits in ((torch.float16, 64, True), (torch.float16, 80, False), (torch.float32, 16, False)):
        inputs = random_inputs(20, kv_heads=1, head_dim=128, dtype=dtype)
        spec = spec_of(inputs, {"chunk_size": chunk_size})
        assert (backend._triton_obstacle(inputs.q, 1, spec) is None) == fits


@pytest.mark.parametrize(
    ("shape", "change", "obstacle"),
    [
        ({"dtype": torch.float32}, {"alpha": 1.4}, r"alpha is 1.4, the kernels take 1.5"),
        ({"dtype": torch.float64}, {}, r"float64 is computed by the eager backend"),
        (
            {"dtype": torch.float16, "head_dim": 257},
            {},
            r"head_dim is 257, the kernels take up to 256",
        ),
        (
            {"dtype": torch.float32, "head_dim": 129},
            {},
            r"head_dim 129 with chunk_size 16 in torch.float32 does not fit into shared memory",
        ),
        (
            {"dtype": torch.float32, "head_dim": 96},
            {"chunk_size": 80},
            r"head_dim 96 with chunk_size 80 in torch.float32 does not fit into shared memory",
        ),
        (
            {"dtype": torch.float32},
            {"routing_scale": 30.0, "prior_sigma": 0.1},
            r"routing_scale x max(1, 1 / prior_sigma) is 300, the kernels take up to 200",
        ),
        ({"dtype": torch.float16, "group": 32}, {}, r"32 query heads share a KV head, the kernels take up to 16"),
    ],
)
def test_calls_beyond_the_kernels_fall_back_and_say_so_once(
    shape: dict[str, Any],
    change: dict[str, Any],
    obstacle: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = random_inputs(40, kv_heads=1, **shape)
    tensors = inputs.q, inputs.k, inputs.v, inputs.summary_query
    call = {"chunk_size": C} | change
    with pytest.raises(ValueError, match=re.escape(f"backend 'triton' cannot take this call: {obstacle}")):
        dash_attention(*tensors, backend="triton", **call)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # "auto" thinks of Triton on a GPU only
    backend._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        outs = [dash_attention(*tensors, **call) for _ in range(2)]
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [obstacle]
    expected, _ = reference_dash_attention(*(x.double() for x in tensors), **call)
    for out in outs:
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: bfloat16 is wrong in Triton's interpreter")
@pytest.mark.parametrize("prior_sigma", [None, 1.0])
@pytest.mark.parametrize(
    ("seq_len", "kv_heads", "group", "head_dim", "chunk_size"),
    [(1000, 2, 4, 128, 64), (4096 + 17, 2, 8, 64, 32), (3000, 2, 1, 256, 128), (16384, 1, 2, 128, 64)],
)
def test_bfloat16_is_as_exact_as_an_eager_implementation(
    seq_len: int, kv_heads: int, group: int, head_dim: int, chunk_size: int, prior_sigma: float | None
) -> None:
    inputs = random_inputs(seq_len, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=torch.bfloat16)
    call = {"chunk_size": chunk_size, "prior_sigma": prior_sigma, "routing_scale": 4.0}
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    torch.cuda.empty_cache()
    ours = relative_errors(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected)
    eager = relative_errors(output_and_gradients(reference_dash_attention, inputs, **call), expected)
    print(f"relative errors, Triton {ours}, eager bfloat16 {eager}")
    for name, error in ours.items():
        assert error <= 2 * eager[name], (name, ours, eager)

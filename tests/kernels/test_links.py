"""The stages by links: against the float64 reference, in parts, and where they are chosen."""

from typing import Any

import pytest
import torch

from dash_kernels import AttentionSpec, dash_attention, reference_dash_attention
from dash_kernels import triton as triton_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.selection import TopChunks
from dash_kernels.spec import Part, Queries
from dash_kernels.triton import links
from dash_kernels.triton.key_rows import KeyRows
from dash_kernels.triton.links import Slab, linked, linked_slabs
from dash_kernels.triton.reached import tile_efficiency, walked
from dash_kernels.triton.tiles import TileShape
from tests.kernels import test_parts, test_selection
from tests.kernels.attention_inputs import DEVICE, assert_close, clear_inputs, output_and_gradients, random_inputs
from tests.support.cases import exhaustive

C = 16
# (group, head_dim, chunk_size, prior_sigma, tokens, KV heads, dtype, tolerance)
SHAPES = [
    (2, 32, 16, None, 75, 2, torch.float32, 2e-5),
    (3, 96, 48, 1.5, 130, 1, torch.float32, 2e-5),
    (4, 64, 32, None, 150, 1, torch.float16, 3e-3),
    (16, 64, 16, 1.0, 45, 1, torch.float16, 3e-3),
]


@pytest.fixture
def by_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links for any call, pieces of few links, and slabs of few chunks."""
    monkeypatch.setattr(links, "LEAST_TOKENS", 0)
    monkeypatch.setattr(links, "LEAST_EFFICIENCY", float("inf"))
    monkeypatch.setattr(links, "LINKS_OF_WORK", 24)
    monkeypatch.setattr(links, "MAX_LINK_BYTES", 2**16)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Slab]:
    """Slabs whose links were made."""
    found = []

    def note(queries: Queries, keys: KeyRows, slab: Slab, spec: AttentionSpec) -> links.Links:
        found.append(slab)
        return linked(queries, keys, slab, spec)

    for stage in ("attend", "query_gradient", "key_gradient"):
        monkeypatch.setattr(f"dash_kernels.triton.linked_{stage}.linked", note)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "head_dim", "chunk_size", "prior_sigma", "tokens", "kv_heads", "dtype", "tolerance"), SHAPES
)
def test_equals_the_reference(
    group: int,
    head_dim: int,
    chunk_size: int,
    prior_sigma: float | None,
    tokens: int,
    kv_heads: int,
    dtype: torch.dtype,
    tolerance: float,
    by_links: None,
    launched: list[Slab],
) -> None:
    call = {"chunk_size": chunk_size, "prior_sigma": prior_sigma, "routing_scale": 2.0}
    inputs = clear_inputs(tokens, call, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype)
    expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **call)
    assert_close(output_and_gradients(dash_attention, inputs, backend="triton", **call), expected, tolerance)
    assert len(launched) > 3, "one slab for each pass"


@pytest.mark.slow
@pytest.mark.parametrize("prior_sigma", exhaustive([None, 1.5], [None]))
def test_documents_and_batches(prior_sigma: float | None, by_links: None, launched: list[Slab]) -> None:
    """Documents of incomplete chunks and of one token; sequences of a batch."""
    call: dict[str, Any] = {"chunk_size": C, "prior_sigma": prior_sigma, "routing_scale": 2.0}
    bounds = torch.tensor([0, 70, 71, 151, 151, 187], dtype=torch.int32, device=DEVICE)
    for batch, cu_seqlens in ((1, bounds), (2, None)):
        documents = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        inputs = clear_inputs(187 if batch == 1 else 70, call, batch=batch, dtype=torch.float32, **documents)
        expected = output_and_gradients(reference_dash_attention, inputs.to(torch.float64), **documents, **call)
        found = output_and_gradients(dash_attention, inputs, backend="triton", **documents, **call)
        assert_close(found, expected, 2e-5)
    assert launched


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "prior_sigma"), [([4 * C], None), ([40, 1, 3 * C, 0, 9], 1.5)])
def test_shards(sizes: list[int], prior_sigma: float | None, by_links: None, launched: list[Slab]) -> None:
    test_parts.test_shards_together_are_the_whole("triton float32", sizes, prior_sigma)
    assert launched


@pytest.mark.slow
def test_blocks(by_links: None, launched: list[Slab]) -> None:
    test_parts.test_blocks_that_were_reached_stand_for_the_rest_of_the_sequence("triton float32", 2, 1.5)
    assert launched


@pytest.mark.slow
def test_lists_of_a_fixed_selection(by_links: None, launched: list[Slab]) -> None:
    inputs = random_inputs(75, group=2, head_dim=32, dtype=torch.float32)
    assert_close(*test_selection.both(inputs, TopChunks(3), backend="triton"), 2e-5)
    assert launched


@pytest.mark.slow
def test_the_same_bits_again(by_links: None) -> None:
    inputs = random_inputs(6 * C, dtype=torch.float16, group=2)
    first, again = (
        output_and_gradients(dash_attention, inputs, backend="triton", chunk_size=C, routing_scale=2.0)
        for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


def _routed(tokens: int) -> tuple[Queries, KeyRows, TileShape, AttentionSpec]:
    inputs = random_inputs(tokens, dtype=torch.float32, group=2, batch=2)
    spec = AttentionSpec(C, routing_scale=30.0).for_head_dim(inputs.q.shape[-1])
    grid = ChunkGrid.whole_sequence(tokens, C)
    summaries = triton_backend.summarize(inputs.k, grid, inputs.summary_query, spec)
    routing = triton_backend.route(inputs.q, grid, summaries, spec)
    tile = TileShape.of(inputs.q, inputs.k.shape[2], spec)
    keys = KeyRows.of(Part(inputs.k, inputs.v, grid), summaries.shape, tile)
    return Queries(inputs.q, grid, summaries, routing), keys, tile, spec


@pytest.mark.slow
def test_links_are_what_was_selected(by_links: None) -> None:
    """In both orders, each token's as many as routing has counted."""
    queries, keys, tile, spec = _routed(9 * C + 5)
    slabs = linked_slabs(queries, tile)
    assert slabs is not None
    assert len(slabs) > 1
    assert [slab.first_slot for slab in slabs[1:]] == [slab.last_slot for slab in slabs[:-1]]
    assert sum(slab.tokens for slab in slabs) == 9 * C + 5
    n, kv_heads = queries.summaries.shape[1:3]
    for slab in slabs:
        found = linked(queries, keys, slab, spec)
        earlier = queries.routing.selected[:, slab.first_token : slab.first_token + slab.tokens] - 1
        assert slab.links == earlier.sum() == found.bounds[-1]
        assert torch.equal(found.held, earlier)
        assert sorted(found.slots.tolist()) == list(range(slab.links))
        for segment in range(found.segments):
            of_segment = slice(int(found.bounds[segment]), int(found.bounds[segment + 1]))
            slots, tokens = found.slots[of_segment], found.tokens[of_segment]
            assert (found.chunks[slots.long()] == segment % n).all()
            assert (tokens.diff() > 0).all()
            local, head = tokens.long() - slab.first_token, segment // n % kv_heads
            begins = found.begins[segment // n // kv_heads, local, head]
            assert ((slots >= begins) & (slots < begins + earlier[segment // n // kv_heads, local, head])).all()


@pytest.mark.slow
def test_where_links_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, _, tile, spec = _routed(9 * C)
    assert linked_slabs(queries, tile) is None, "too few tokens"
    monkeypatch.setattr(links, "LEAST_TOKENS", 2 * 9 * C)
    efficiency = tile_efficiency(queries.routing, queries.chunks, spec)
    rows = (queries.routing.selected - 1).sum() / (walked(queries.routing)[0] * tile.tokens)
    assert efficiency == pytest.approx(rows.item())
    for least, chosen in ((efficiency * 0.99, False), (efficiency * 1.01, True)):
        monkeypatch.setattr(links, "LEAST_EFFICIENCY", least)
        assert (linked_slabs(queries, tile) is not None) == chosen

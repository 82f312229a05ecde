"""What the ranks of the tests of Native Sparse Attention do."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from dash_dist import join_sequence, split_sequence
from dash_dist.context_parallel.layout import LAYOUTS
from dash_dist.context_parallel.nsa import NSAAttention
from dash_dist.context_parallel.shard_selections import shard_selections
from dash_kernels import AttentionSpec, ChunkGrid
from dash_kernels.nsa import Branches
from dash_kernels.selection import NSA
from tests.context_parallel.attention_cases import CHUNK, crossing_documents, name_of, padding_at, ways
from tests.kernels.nsa_inputs import NAMES, Found, NSAInputs, expected_of, random_nsa_inputs

TOKENS = 16 * CHUNK
WINDOW = 2 * CHUNK + 3
SPEC = AttentionSpec(CHUNK, selection=NSA(4))
_OF_TOKENS = (0, 1, 2, 4, 5, 6, 7, 8)
"""Places in `NAMES` of what is split over the ranks."""


def same_nsa_inputs() -> NSAInputs:
    """Fresh at every run, the same at every rank."""
    seed = torch.tensor([torch.seed() % 2**62])
    dist.broadcast(seed, 0)
    return random_nsa_inputs(TOKENS, width=8, generator=torch.Generator().manual_seed(int(seed)))


def layer_of(inputs: NSAInputs, layout: str, spec: AttentionSpec = SPEC, **options: Any) -> NSAAttention:
    """The module with the inputs' weights, over all ranks."""
    kv_heads, head_dim = inputs.tensors[3].shape
    layer = NSAAttention(
        kv_heads,
        head_dim,
        spec,
        window=WINDOW,
        layout=layout,
        cp_group=dist.group.WORLD,
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        for weight, value in zip(weights_of(layer), inputs.tensors[3:4] + inputs.tensors[9:], strict=True):
            weight.copy_(value)
    return layer


def weights_of(layer: NSAAttention) -> tuple[torch.Tensor, ...]:
    """In the order of `NAMES`."""
    return layer.summary_query, *layer.key_weights, *layer.value_weights


def whole_results(
    inputs: NSAInputs, layer: NSAAttention, layout: str, chunks: ChunkGrid | None, *, recompute: bool = False
) -> Found:
    """Output, selected chunks and gradients of the whole sequence, at every rank."""
    group = dist.group.WORLD
    layer.record_routing = True
    angles = None
    if inputs.angles is not None:
        cosines, sines = (split_sequence(x, group, layout=layout, dim=0).contiguous() for x in inputs.angles)
        angles = cosines, sines
    leaves = [split_sequence(inputs.tensors[i], group, layout=layout).clone().requires_grad_() for i in _OF_TOKENS]

    def call(*given: torch.Tensor) -> torch.Tensor:
        q, k, v, *others = given
        out: torch.Tensor = layer(q, k, v, chunks=chunks, branches=Branches(*others, angles))
        return out

    out = checkpoint(call, *leaves, use_reentrant=True) if recompute else call(*leaves)
    out.backward(split_sequence(inputs.grad, group, layout=layout))
    assert layer.routing is not None
    found = {"output": join_sequence(out.detach(), group, layout=layout)}
    found["selected"] = join_sequence(layer.routing.selected_per_token, group, layout=layout)
    for place, leaf in zip(_OF_TOKENS, leaves, strict=True):
        assert leaf.grad is not None
        found[NAMES[place]] = join_sequence(leaf.grad, group, layout=layout)
    for name, weight in zip((NAMES[3], *NAMES[9:]), weights_of(layer), strict=True):
        assert weight.grad is not None
        dist.all_reduce(weight.grad)
        found[name] = weight.grad
    return found


def differences(found: Found, expected: Found) -> dict[str, float]:
    """Largest difference of each, relative to the largest element; NaN counts as infinite."""
    return {
        name: ((found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).nan_to_num(torch.inf).item()
        for name, wanted in expected.items()
    }


def same_expected(inputs: NSAInputs, spec: AttentionSpec, cu_seqlens: torch.Tensor | None) -> Found:
    """The float64 reference, computed by rank 0."""
    found: list[Found | None] = [expected_of(inputs, spec, WINDOW, cu_seqlens) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    assert found[0] is not None
    return found[0]


def parity(
    layouts: tuple[str, ...] = LAYOUTS, exchange: str | None = None, chunk_size: int = CHUNK
) -> dict[str, dict[str, float]]:
    """Every exchange, layout and kind of documents against the reference."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory in which nothing has arrived is NaN
    spec, chunks_in_all = AttentionSpec(chunk_size, selection=SPEC.selection), TOKENS // chunk_size
    cases = {("one document", layout): None for layout in layouts}
    cases |= {("packed", layout): crossing_documents(chunks_in_all) for layout in layouts}
    cases |= {("a rank of padding", layout): padding_at(1, chunks_in_all, layout) for layout in layouts}
    inputs = same_nsa_inputs()
    wanted: dict[tuple[int, ...] | None, Found] = {}
    found = {}
    for (kind, layout), bounds in cases.items():
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32) * chunk_size
        chunks = None if cu_seqlens is None else ChunkGrid.packed(cu_seqlens.tolist(), chunk_size)
        if bounds not in wanted:
            wanted[bounds] = same_expected(inputs, spec, cu_seqlens)
        for way in ways() if exchange is None else [{"exchange": exchange}]:
            result = whole_results(inputs, layer_of(inputs, layout, spec, **way), layout, chunks)
            found[name_of(layout, way, kind)] = differences(result, wanted[bounds])
    return found


def recomputed() -> dict[str, dict[str, float]]:
    """A layer whose activations are recomputed against one that keeps them."""
    found = {}
    inputs = same_nsa_inputs()
    kept = whole_results(inputs, layer_of(inputs, "zigzag"), "zigzag", None)
    for way in ("none", "selective", "full"):
        layer = layer_of(inputs, "zigzag", recompute=way)
        found[way] = differences(whole_results(inputs, layer, "zigzag", None, recompute=True), kept)
        assert layer.memory is None or len(layer.memory) == 0
    return found


def counted_selections() -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks selected by stretch of the sequence, over all ranks, and their number by the layer's own statistics."""
    group, inputs = dist.group.WORLD, same_nsa_inputs()
    layer = layer_of(inputs, "zigzag")
    tensors = [split_sequence(inputs.tensors[i], group) for i in _OF_TOKENS]
    assert inputs.angles is not None
    cosines, sines = (split_sequence(x, group, dim=0).contiguous() for x in inputs.angles)
    branches = Branches(*tensors[3:], (cosines, sines))
    layer.record_routing = True
    layer(*tensors[:3], branches=branches)
    counts = shard_selections(layer, tensors[0], tensors[1], None, bins=TOKENS // CHUNK, branches=branches)
    dist.all_reduce(counts)
    assert layer.routing is not None
    total = layer.routing.selected_per_token.sum()
    dist.all_reduce(total)
    return counts[0].sum(), total


def mistake() -> str:
    """The error at this rank where another one has another window."""
    inputs = same_nsa_inputs()
    layer = layer_of(inputs, "zigzag")
    layer.window += dist.get_rank()
    tensors = [split_sequence(inputs.tensors[i], dist.group.WORLD) for i in _OF_TOKENS]
    try:
        layer(*tensors[:3], branches=Branches(*tensors[3:]))
    except ValueError as error:
        return str(error)
    return ""

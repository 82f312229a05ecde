"""What the ranks of the tests of window attention do."""

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from dash_dist import join_sequence, split_sequence
from dash_dist.context_parallel import WindowAttention
from dash_dist.context_parallel.layout import LAYOUTS
from dash_dist.cost_model.topology import Topology
from dash_kernels import ChunkGrid
from dash_kernels.reference import reference_window_attention
from tests.context_parallel.attention_cases import (
    CHUNK,
    HEAD_DIM,
    Inputs,
    counted,
    crossing_documents,
    device,
    padding_at,
    same_inputs,
)

CHUNKS = 32
WINDOWS = (1, 17, 4 * CHUNK, 9 * CHUNK + 3, 10_000)
"""A token, beyond a chunk, a piece, more than a piece, and the whole sequence."""


def attend(
    inputs: Inputs, window: int, layout: str, *, recompute: bool = False, ranks_per_node: int | None = None
) -> tuple[list[torch.Tensor], WindowAttention]:
    """Output and gradients of q, k and v of the whole sequence."""
    group = dist.group.WORLD
    layer = WindowAttention(
        inputs.k.shape[2],
        HEAD_DIM,
        window,
        chunk_size=CHUNK,
        layout=layout,
        cp_group=group,
        ranks_per_node=ranks_per_node,
        device=device(),
        dtype=inputs.q.dtype,
    )
    chunks = None if inputs.cu_seqlens is None else ChunkGrid.packed(inputs.cu_seqlens.tolist(), CHUNK)

    def call(*qkv: torch.Tensor) -> torch.Tensor:
        return layer(*qkv, chunks=chunks)

    leaves = [split_sequence(x, group, layout=layout).clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = checkpoint(call, *leaves, use_reentrant=True) if recompute else call(*leaves)
    out.backward(split_sequence(inputs.grad, group, layout=layout))
    assert layer.summary_query.grad is not None
    assert not layer.summary_query.grad.any()
    return [join_sequence(x, group, layout=layout) for x in (out.detach(), *(leaf.grad for leaf in leaves))], layer


def expected(inputs: Inputs, window: int) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = reference_window_attention(*leaves, window=window, cu_seqlens=inputs.cu_seqlens)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)]


def parity() -> dict[str, float]:
    """Largest difference of output and gradients, of every layout, window and kind of documents."""
    kinds: dict[str, Callable[[str], Inputs]] = {
        "one document": lambda _: same_inputs(CHUNKS),
        "packed": lambda _: same_inputs(CHUNKS, batch=1, bounds=crossing_documents(CHUNKS)),
        "a rank of padding": lambda layout: same_inputs(CHUNKS, batch=1, bounds=padding_at(1, CHUNKS, layout)),
    }
    found = {}
    for (kind, make), layout in itertools.product(kinds.items(), LAYOUTS):
        inputs = make(layout)
        for window in WINDOWS:
            got, layer = attend(inputs, window, layout)
            pairs = zip(got, expected(inputs, window), strict=True)
            found[f"{kind}, {layout}, {window}"] = max(float((a - b).abs().max()) for a, b in pairs)
            assert layer.traffic.take().exchanges == {"halo": 1}
    return found


def recomputed() -> dict[str, bool]:
    """Recomputation gives the same bits."""
    inputs = same_inputs(CHUNKS, torch.float32)
    found = {}
    for layout, window in itertools.product(LAYOUTS, WINDOWS):
        once, again = (attend(inputs, window, layout, recompute=recompute)[0] for recompute in (False, True))
        found[f"{layout}, {window}"] = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    return found


def sent_chunks(window: int) -> dict[str, tuple[int, int, int]]:
    """Layout -> chunks that all ranks sent for one pass of K and V, and of gradients, those of them over slow links,
    and all-to-alls of one rank. Pairs of ranks are nodes."""
    inputs = same_inputs(CHUNKS, torch.float32)
    chunk_bytes = 2 * inputs.k[:, :CHUNK].nbytes
    found = {}
    for layout in LAYOUTS:
        with counted(Topology(dist.get_world_size(), 2)) as given:
            _, layer = attend(inputs, window, layout, ranks_per_node=2)
        traffic = layer.traffic.take()
        assert traffic.sent_bytes == traffic.planned_bytes == given.fast + given.slow
        assert traffic.slow_link_bytes == given.slow
        assert traffic.sent_bytes <= traffic.dense_bytes
        assert given.calls["plan"] == 0
        sent = torch.tensor([given.fast + given.slow, given.slow])
        dist.all_reduce(sent)
        total, slow = (sent // chunk_bytes).tolist()
        found[layout] = total, slow, given.calls["tensors"]
    return found


def mistakes() -> dict[str, str]:
    """The error at this rank where another one calls otherwise."""
    rank = dist.get_rank()
    inputs = same_inputs(CHUNKS)
    packed = same_inputs(CHUNKS, batch=1, bounds=(0, 3, CHUNKS) if rank else (0, 4, CHUNKS))
    q, k, v, grad = (x[:, : 24 * CHUNK + 8] for x in (inputs.q, inputs.k, inputs.v, inputs.grad))
    odd = Inputs(q, k, v, inputs.summary_query, grad)
    cases: dict[str, tuple[Inputs, int]] = {
        "window": (inputs, 5 + rank),
        "documents": (packed, 5),
        "length": (odd, 5),
    }
    found = {}
    for name, (given, window) in cases.items():
        try:
            attend(given, window, "zigzag")
        except ValueError as error:
            found[name] = str(error)
    return found

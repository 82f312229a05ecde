"""What the ranks of the tests of a fixed number of chunks do."""

import itertools

import torch
import torch.distributed as dist

from dash_dist.context_parallel.layout import LAYOUTS
from dash_kernels import AttentionSpec
from dash_kernels.reference_selection import reference_selected_attention
from dash_kernels.selection import InfLLMv2, SelectionRule, TopChunks
from tests.context_parallel.attention_cases import (
    CHUNK,
    Inputs,
    Result,
    crossing_documents,
    joined,
    name_of,
    of_shard,
    padding_at,
    same_inputs,
    ways,
)

CHUNKS = 16
SELECTIONS: dict[str, SelectionRule] = {
    "topk": TopChunks(4),
    "infllmv2": InfLLMv2(5, first_chunks=1, local_chunks=2, dense_length=0),
    "short documents dense": InfLLMv2(3, first_chunks=0, local_chunks=1, dense_length=8 * CHUNK),
}


def expected(inputs: Inputs, selection: SelectionRule) -> Result:
    """The float64 reference on the whole sequence."""
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.summary_query)]
    out, routing = reference_selected_attention(
        *leaves, selection=selection, chunk_size=CHUNK, cu_seqlens=inputs.cu_seqlens
    )
    gradients = torch.autograd.grad(out, leaves, inputs.grad)
    return Result([out.detach(), *gradients], routing.selected_per_token, float(routing.density))


def parity(layouts: tuple[str, ...] = LAYOUTS, exchange: str | None = None) -> dict[str, dict[str, float]]:
    """Every exchange, layout and kind of documents against the reference."""
    world = dist.group.WORLD
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory in which nothing has arrived is NaN
    found = {}
    for (name, selection), layout in itertools.product(SELECTIONS.items(), layouts):
        cases = {
            "one document": same_inputs(CHUNKS, batch=1),
            "packed": same_inputs(CHUNKS, batch=1, bounds=crossing_documents(CHUNKS)),
            "a rank of padding": same_inputs(CHUNKS, batch=1, bounds=padding_at(1, CHUNKS, layout)),
        }
        for kind, inputs in cases.items():
            wanted = expected(inputs, selection)
            for way in ways() if exchange is None else [{"exchange": exchange}]:
                spec = AttentionSpec(CHUNK, selection=selection)
                result = joined(of_shard(inputs, world, layout, spec=spec, **way), world, layout)
                found[name_of(layout, way, name, kind)] = result.differences(wanted)
    return found


def mistake() -> str:
    """The error at this rank where another one selects otherwise."""
    world = dist.group.WORLD
    spec = AttentionSpec(CHUNK, selection=TopChunks(3 + dist.get_rank()))
    try:
        of_shard(same_inputs(CHUNKS, batch=1), world, "zigzag", spec=spec)
    except ValueError as error:
        return str(error)
    return ""

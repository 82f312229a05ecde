"""Jobs that show that routing selects the same chunks on any number of ranks."""

import itertools
from typing import Any

import torch
import torch.distributed as dist

from dash_dist import dash_attention, join_sequence, split_sequence
from dash_kernels import eager
from dash_kernels import triton as triton_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import AttentionSpec, Routing
from tests.context_parallel.attention_cases import (
    CHUNK,
    LAYOUTS,
    SETTINGS,
    crossing_documents,
    joined,
    of_shard,
    one_process,
    recorded,
    same_inputs,
)


def allowed(chunks: ChunkGrid, n: int) -> torch.Tensor:
    """bool [slots, n]: which chunks the queries of each chunk may be routed to."""
    candidates = torch.arange(n)
    return (candidates >= chunks.firsts[:, None]) & (candidates < chunks.ids[:, None])


def distances(
    q: torch.Tensor, chunks: ChunkGrid, summaries: torch.Tensor, spec: AttentionSpec, routing: Routing
) -> torch.Tensor:
    """x - tau of every query head and chunk, [B, T, Hkv, G, n]; -inf for chunks that it may not be routed to."""
    heads = summaries.shape[2], -1
    factor = (spec.alpha - 1) * spec.routing_logit_scale
    x = torch.einsum("bthgd,bnhd->bthgn", (q * factor).unflatten(2, heads), summaries)
    may = allowed(chunks, summaries.shape[1]).repeat_interleave(spec.chunk_size, 0)[None, :, None, None]
    return (x - routing.tau.unflatten(2, heads).unsqueeze(-1)).masked_fill(~may, -torch.inf)


def selection_of_group_sizes() -> dict[str, dict[str, Any]]:
    """In groups of 1, 2 and 4 ranks, every one with the whole sequence: the chunks that every token selects, from
    thresholds and summaries, as bits; and the selected chunks per token.

    In float64 a score would have to be as near its threshold as 1e-14 for the order of its sums to matter.
    """
    chunks = 16
    groups = {size: dist.new_subgroups(size)[0] for size in (1, 2)} | {4: dist.group.WORLD}
    found = {}
    for bounds, layout in itertools.product((None, crossing_documents(chunks)), LAYOUTS):
        inputs = same_inputs(chunks, batch=1 if bounds else 2, bounds=bounds)
        selections, counts = [], []
        for group in groups.values():
            with recorded(eager, "route") as calls:
                shards = [split_sequence(x, group, layout=layout) for x in (inputs.q, inputs.k, inputs.v)]
                _, routing_of_shard = dash_attention(
                    *shards,
                    inputs.summary_query,
                    cu_seqlens=inputs.cu_seqlens,
                    cp_group=group,
                    layout=layout,
                    return_routing=True,
                    **SETTINGS,
                )
            [((q, query_chunks, summaries, spec), routing)] = calls
            p = distances(q, query_chunks, summaries, spec, routing).clamp(min=0).square()
            selections.append(join_sequence((p.mean(3) > 0).int(), group, layout=layout))
            counts.append(join_sequence(routing_of_shard.selected_per_token, group, layout=layout))
        found[f"{layout}, {bounds}"] = {
            "bits": all(torch.equal(bits, selections[0]) for bits in selections[1:]),
            "counts": all(torch.equal(count, counts[0]) for count in counts[1:]),
            "one count": torch.equal(selections[0].sum(-1) + 1, counts[0]),
            "selected": selections[0].double().mean().item(),
        }
    return found


def interpreted_kernels() -> dict[str, dict[str, float]]:
    """The kernels in float32 through Triton's interpreter, on sequences that are small enough for it: the selective
    exchange against one process in float64, and bits by tile against those of the whole sequence.
    """
    world, size = dist.group.WORLD, dist.get_world_size()
    call: dict[str, Any] = {"chunk_size": CHUNK, "routing_scale": 60.0}
    found = {}
    for layout, bounds in (("zigzag", None), ("contiguous", (0, 1, 2 * size + 1, 3 * size))):
        chunks = 3 * size if bounds else 2 * size
        grid = ChunkGrid.packed([bound * CHUNK for bound in bounds or (0, chunks)], CHUNK)
        for _ in range(100):  # until float32 can tell what is selected, and the summary query's gradient is no 0
            narrow = same_inputs(chunks, torch.float32, heads=(2, 1), batch=1, bounds=bounds)
            inputs = narrow.to(torch.float64)
            with recorded(eager, "route") as calls:
                expected = one_process(inputs, at_every_rank=True, **call)
            [(arguments, routing)] = calls
            margin, summary_query_grad = distances(*arguments, routing).abs().amin(), expected.tensors[-1]
            if margin > 1e-4 and summary_query_grad.abs().amax() > 0.5:
                break
        else:
            raise AssertionError("no inputs with a margin in 100 draws")
        spec = arguments[-1]
        with recorded(triton_backend, "route") as calls:
            shard = of_shard(narrow, world, layout, exchange="selective", backend="triton", **call)
        [((_, own_chunks, _, _), routing)] = calls
        summaries = triton_backend.summarize(narrow.k, grid, narrow.summary_query, spec)
        of_whole = triton_backend.route(narrow.q, grid, summaries, spec)
        bits = join_sequence(_bits(routing, own_chunks, chunks), world, layout=layout)
        wanted = _bits(of_whole, grid, chunks)
        assert wanted.any()
        found[layout] = joined(shard, world, layout).differences(expected) | {
            "bits": (bits != wanted).sum().item(),
            "density": expected.density,
        }
    return found


def _bits(routing: Routing, chunks: ChunkGrid, n: int) -> torch.Tensor:
    """The bits that routing leaves for its tiles, int32 [B, tiles, Hkv, n]; 0 where it need not write them."""
    bits = (routing.masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    by_chunk = bits.flatten(-2)[..., :n].unflatten(2, (len(chunks), -1))  # [B, Hkv, slots, tiles of a chunk, n]
    written = by_chunk.masked_fill(~allowed(chunks, n)[:, None], 0)
    return written.flatten(2, 3).transpose(1, 2).contiguous()

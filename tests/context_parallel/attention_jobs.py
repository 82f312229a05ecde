"""Jobs of the attention's ranks. Every job runs many cases in the same processes."""

import itertools
import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dash_dist import DashAttention, join_sequence, shard_positions, split_sequence
from dash_dist.context_parallel import blocks, choice
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.cost_model.exchange import MEMORY_BUDGET, cheapest, predict
from dash_dist.cost_model.links import Links
from dash_dist.cost_model.topology import Topology
from dash_kernels import dash_attention as dash_attention_one_device
from tests.context_parallel.attention_cases import (
    CHUNK,
    HEAD_DIM,
    LAYOUTS,
    SETTINGS,
    Inputs,
    counted,
    crossing_documents,
    device,
    joined,
    name_of,
    of_shard,
    one_process,
    padding_at,
    recorded,
    replaced,
    same_inputs,
    shun,
    ways,
)


def parity() -> dict[str, dict[str, float]]:
    """Every exchange, layout and kind of documents against one process."""
    world, chunks = dist.group.WORLD, 16
    settings: list[dict[str, Any]] = [{}, {"prior_sigma": 1.5}]
    cases: list[tuple[str, Inputs, dict[str, Any], tuple[str, ...]]] = []
    for setting in settings:
        cases.append(("one document", same_inputs(chunks), setting, LAYOUTS))
        packed = same_inputs(chunks, batch=1, bounds=crossing_documents(chunks))
        cases.append(("packed", packed, setting, LAYOUTS))
    first = {"attend_first_chunk": True}
    cases.append(("first chunk attended", same_inputs(chunks), first, LAYOUTS))
    cases.append(("packed, first chunks attended", packed, first | {"prior_sigma": 1.5}, LAYOUTS))
    cases.append(("alpha 1.8", same_inputs(chunks), {"alpha": 1.8}, ("zigzag",)))
    cases.append(("packed, finer", packed, {}, ("double_zigzag",)))
    for layout in LAYOUTS:
        padded = same_inputs(chunks, batch=1, bounds=padding_at(1, chunks, layout))
        cases.append(("a rank of padding", padded, {}, (layout,)))
    found = {}
    for name, inputs, setting, layouts in cases:
        expected = one_process(inputs, **SETTINGS, **setting)
        # With prior_sigma "auto" is left out: it is one of the others.
        for layout, way in itertools.product(layouts, ways()[1:] if "prior_sigma" in setting else ways()):
            result = joined(of_shard(inputs, world, layout, **way, **SETTINGS, **setting), world, layout)
            differences = result.differences(expected)
            found[name_of(layout, way, name, setting)] = differences | {"density": expected.density}
    return found


def parity_of_the_smallest_shards() -> dict[str, dict[str, float]]:
    """One chunk per rank, of one document, and of documents of one chunk each: nothing travels."""
    world, size = dist.group.WORLD, dist.get_world_size()
    found = {}
    for bounds in (None, tuple(range(size + 1))):
        inputs = same_inputs(size, heads=(3, 3), batch=1, bounds=bounds)
        expected = one_process(inputs, **SETTINGS)
        for way in ways():
            traffic = Traffic()
            shard = of_shard(inputs, world, "contiguous", traffic=traffic, **way, **SETTINGS)
            differences = joined(shard, world, "contiguous").differences(expected)
            found[name_of("contiguous", way, bounds)] = differences
            summary = traffic.take()
            if bounds is not None and summary.exchanges.get("selective"):
                assert summary.sent_bytes == summary.planned_bytes == 0
    return found


def triton_parity() -> dict[str, float]:
    """bfloat16 kernels under NCCL against one GPU."""
    inputs, world = same_inputs(64, torch.bfloat16), dist.group.WORLD
    call: dict[str, Any] = {"backend": "triton", **SETTINGS, "routing_scale": 12.0}
    expected = one_process(inputs, **call)
    result = joined(of_shard(inputs, world, "zigzag", exchange="ring", **call), world, "zigzag")
    return result.differences(expected) | {"density": expected.density}


def same_bits() -> dict[str, dict[str, bool]]:
    """A call's output and gradients, again; and with NaN in every chunk that the plan does not send, where a sender
    takes what it sends from, and in all memory in which nothing has arrived.
    """
    world, chunks = dist.group.WORLD, 4 * dist.get_world_size()
    pack, poisoned = blocks.pack, []

    def pack_from_poisoned(k: torch.Tensor, v: torch.Tensor, places: torch.Tensor, chunk_size: int) -> torch.Tensor:
        stays = torch.ones(k.shape[0], k.shape[1] // chunk_size, k.shape[2], dtype=torch.bool, device=k.device)
        stays[tuple(places)] = False
        poisoned.append(int(stays.sum()))
        tokens = stays.repeat_interleave(chunk_size, 1).unsqueeze(-1)
        return pack(k.masked_fill(tokens, torch.nan), v.masked_fill(tokens, torch.nan), places, chunk_size)

    found = {}
    cases = zip(LAYOUTS, (None, crossing_documents(chunks)), strict=True)
    for layout, bounds in cases:
        inputs = same_inputs(chunks, torch.float32, batch=1 if bounds else 2, bounds=bounds)
        shun(inputs, slice(1, None, 2))
        for way in ways()[1:]:  # "auto" is one of the others
            run = partial(of_shard, inputs, world, layout, prior_sigma=1.5, **way, **SETTINGS)
            expected, again = run(), run()
            torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
            assert torch.empty(4).isnan().all()
            with replaced(blocks, "pack", pack_from_poisoned):
                with_poison = run()
            torch.use_deterministic_algorithms(False)
            found[name_of(layout, way)] = {
                "again": again.same_bits_as(expected),
                "with poison": with_poison.same_bits_as(expected),
            }
    assert any(poisoned), "the plan sent everything: nothing was poisoned"
    return found


def first_token_reaches_the_last_rank() -> dict[str, float]:
    """Change of the last token of the last rank's shard with the sequence's first token, held by rank 0."""
    world, size = dist.group.WORLD, dist.get_world_size()
    found = {}
    for layout in LAYOUTS:
        inputs = same_inputs(4 * size)
        observed = int(shard_positions(inputs.q.shape[1], size - 1, size, layout)[-1])
        # Its routing is sure to select the first chunk.
        inputs.k[:, :CHUNK] = inputs.q[:, observed].unflatten(1, (2, -1)).mean(2).unsqueeze(1) * 10
        changed = Inputs(**vars(inputs) | {"v": inputs.v.clone()})
        changed.v[:, 0] += 1.0
        for way in ways():
            before, after = (of_shard(x, world, layout, **way, **SETTINGS).tensors[0] for x in (inputs, changed))
            if dist.get_rank() == size - 1:
                found[name_of(layout, way)] = (before - after)[:, -1].abs().max().item()
    return found


def a_chunk_that_nobody_selected() -> dict[str, bool]:
    """Keys far from all queries, then other keys and values in their place: what only the chunk's own tokens notice."""
    world, size = dist.group.WORLD, dist.get_world_size()
    chunks, chunk = 4 * size, 1  # held by rank 0 in both layouts, and followed by chunks of every rank
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    found = {}
    for layout in LAYOUTS:
        inputs = same_inputs(chunks)
        shun(inputs, slice(chunk, chunk + 1))
        changed = Inputs(**vars(inputs) | {"k": inputs.k.clone(), "v": inputs.v.clone()})
        changed.k[:, tokens] += torch.linspace(-0.5, 0.5, CHUNK, device=device())[:, None, None]
        changed.v[:, tokens] += 3.0
        expected = one_process(changed, **SETTINGS)
        elsewhere = torch.ones(chunks * CHUNK, dtype=torch.bool, device=device())
        elsewhere[tokens] = False
        for way in ways():
            before, after = (
                joined(of_shard(x, world, layout, **way, **SETTINGS), world, layout) for x in (inputs, changed)
            )
            assert max(after.differences(expected).values()) < 1e-10
            assert not torch.equal(before.tensors[0][:, tokens], after.tensors[0][:, tokens])
            pairs = list(zip(before.tensors[:2], after.tensors[:2], strict=True))  # the output, the gradient of q
            found[name_of(layout, way)] = torch.equal(before.selected, after.selected) and all(
                torch.equal(a[:, elsewhere], b[:, elsewhere]) for a, b in pairs
            )
    return found


def bytes_sent() -> dict[str, dict[str, int]]:
    """Bytes of one forward and backward pass over all ranks, by `Traffic` and by the arguments of all_to_all_single."""
    world, chunks = dist.group.WORLD, 4 * dist.get_world_size()
    packed = same_inputs(chunks, torch.float32, batch=1, bounds=crossing_documents(chunks))
    shared = same_inputs(chunks, torch.float32, batch=1)
    shun(shared, slice(1, None))  # all but the first chunk: every rank selects that one, and it alone
    cases = {"False": same_inputs(chunks, torch.float32), "True": packed, "shared": shared}
    found = {}
    for layout, (name, inputs) in itertools.product(LAYOUTS, cases.items()):
        results = []
        for way in ways():
            if way["exchange"] != "selective":
                continue
            traffic = Traffic()
            with counted(Topology(dist.get_world_size(), 2)) as given:
                results.append(of_shard(inputs, world, layout, traffic=traffic, **way, **SETTINGS))
            summary = traffic.take()
            assert summary.sent_bytes == summary.planned_bytes == given.fast + given.slow
            assert summary.sent_bytes <= summary.dense_bytes
            assert summary.slow_link_bytes == (given.slow if "ranks_per_node" in way else 0)
            assert summary.exchanges == {"selective": 1}
            totals = torch.tensor([given.fast + given.slow, given.slow, summary.dense_bytes])
            dist.all_reduce(totals)
            found[name_of(layout, way, name)] = dict(zip(("sent", "slow", "dense"), totals.tolist(), strict=True))
        for other in results[1:]:
            assert max(other.differences(results[0]).values()) < 1e-4
    return found


def automatic_choices() -> dict[str, list[str]]:
    """Choices of "auto" with constants of the cost model that favour each exchange, and with the default ones."""
    world, size = dist.group.WORLD, dist.get_world_size()
    inputs = same_inputs(4 * size)
    shun(inputs, slice(1, None, 2))  # every other chunk is needed
    alone = same_inputs(4 * size, batch=1, bounds=tuple(range(4 * size + 1)))
    links, budget = Links, MEMORY_BUDGET
    constants: dict[str, tuple[Any, int, Inputs, int]] = {
        "default": (links, budget, inputs, size),
        "bandwidth is scarce": (partial(links, fast_bandwidth=1.0), budget, inputs, size),
        "messages are slow": (partial(links, latency=1.0), budget, inputs, 2),  # two hops take twice as many
        "memory is scarce": (links, 0, inputs, size),
        "nothing is needed": (links, 0, alone, size),
    }
    found = {}
    for name, (chosen_links, chosen_budget, given, ranks_per_node) in constants.items():
        traffic = Traffic()
        with (
            replaced(choice, "Links", chosen_links),
            replaced(choice, "MEMORY_BUDGET", chosen_budget),
            recorded(choice, "make_plan") as plans,
        ):
            for layout in LAYOUTS:
                of_shard(
                    given, world, layout, exchange="auto", ranks_per_node=ranks_per_node, traffic=traffic, **SETTINGS
                )
        names = list(traffic.take().exchanges)
        expected = []
        for _, plan in plans:
            heads, chunks = given.k.shape[2], given.k.shape[0] * 4
            size_of_a_block = 2 * CHUNK * HEAD_DIM
            costs = predict(
                plan.busiest,
                Topology(size, ranks_per_node),
                blocks_per_rank=heads * chunks,
                block_size=size_of_a_block,
                element_size=8,
                gradient_element_size=8,
                group=4,
                planned=True,
            )
            expected.append(cheapest(costs, chosen_links(), chosen_budget))
        assert sorted(set(names)) == sorted(set(expected)), (names, expected)
        found[name] = names
    return found


def split_and_join() -> dict[str, bool]:
    group, size = dist.group.WORLD, dist.get_world_size()
    result = {}
    for layout, dim in itertools.product((*LAYOUTS, "double_zigzag"), (0, 1)):
        shape = (8 * size, 3) if dim == 0 else (3, 8 * size)
        x = torch.arange(math.prod(shape), dtype=torch.float64, device=device()).view(shape).requires_grad_()
        shard = split_sequence(x, group, layout=layout, dim=dim)
        joined = join_sequence(shard, group, layout=layout, dim=dim)
        weights = torch.linspace(0, 1, x.numel(), dtype=torch.float64, device=device()).view(shape)
        (grad,) = torch.autograd.grad((joined * weights).sum(), x)
        result[f"{layout}/{dim}"] = bool(torch.equal(joined, x) and torch.equal(grad, weights))
    return result


def module_trains() -> list[float]:
    """A module's parameter gets the shard's part of the gradient; the sum is the whole one."""
    group = dist.group.WORLD
    inputs = same_inputs(4 * dist.get_world_size())
    module = DashAttention(2, HEAD_DIM, cp_group=group, dtype=torch.float64, device=device(), **SETTINGS)
    module.record_routing = True
    shards = [split_sequence(x, group) for x in (inputs.q, inputs.k, inputs.v)]
    (module(*shards) * split_sequence(inputs.grad, group)).sum().backward()
    assert module.routing is not None
    assert module.summary_query.grad is not None
    dist.all_reduce(module.summary_query.grad)
    zeros = torch.zeros_like(inputs.summary_query, requires_grad=True)
    out = dash_attention_one_device(inputs.q, inputs.k, inputs.v, zeros, **SETTINGS)
    (wanted,) = torch.autograd.grad(out, zeros, inputs.grad)
    return [(module.summary_query.grad - wanted).abs().max().item(), wanted.abs().max().item()]

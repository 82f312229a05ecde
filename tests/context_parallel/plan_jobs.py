"""Jobs of the selective exchange's ranks. They return the differences in words: an empty list is a success."""

import itertools
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dash_dist.context_parallel.blocks import add
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.context_parallel.plan import Plan, make_plan
from dash_dist.context_parallel.selective import fetch, send_home
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.topology import find_topology
from dash_dist.cost_model.topology import Topology
from dash_kernels.chunks import ChunkGrid
from tests.context_parallel.attention_cases import counted, device

BATCH, HEADS, CHUNKS_PER_RANK, CHUNK, HEAD_DIM = 2, 3, 4, 4, 6
BLOCK_BYTES = 2 * CHUNK * HEAD_DIM * 8
Block = tuple[int, int, int]  # index in the batch, KV head, chunk id


def shard_of(group: dist.ProcessGroup, layout: str) -> Shard:
    chunks = dist.get_world_size(group) * CHUNKS_PER_RANK
    return Shard(group, layout, ChunkGrid.whole_sequence(chunks * CHUNK, CHUNK), CHUNK)


def unnoticed(rows: Sequence[int], row_bytes: int) -> None:
    """Bytes are counted where they leave."""


def returned_to(own: torch.Tensor, gradient: torch.Tensor, plan: Plan, shard: Shard) -> torch.Tensor:
    """The gradient of this rank's shard: its own share, and what comes home, added to it in place."""
    return add(own, send_home(gradient, plan, shard, unnoticed).wait(), plan.places, plan.direct.send)


def same_generator() -> torch.Generator:
    """Fresh at every run, the same at every rank."""
    seed = torch.tensor([torch.seed() % 2**62], device=device())
    dist.broadcast(seed, 0)
    return torch.Generator().manual_seed(int(seed))


def masks_of_all_ranks(kind: str, shards: list[list[int]], generator: torch.Generator) -> torch.Tensor:
    """bool [size, B, Hkv, n]: what every rank's queries reach."""
    size = len(shards)
    shape = size, BATCH, HEADS, size * CHUNKS_PER_RANK
    someone = int(torch.randint(size, (), generator=generator))
    if kind == "random":
        return torch.rand(shape, generator=generator) < 0.3
    if kind == "full":
        return torch.ones(shape, dtype=torch.bool)
    reached = torch.zeros(shape, dtype=torch.bool)
    if kind == "one rank asks everything":
        reached[someone] = True
    elif kind == "everybody asks one rank":
        reached[..., shards[someone]] = True
    elif kind == "own chunks only":
        for rank, ids in enumerate(shards):
            reached[rank][..., ids] = True
    elif kind == "neighbours only":  # within nodes of two
        for rank in range(size):
            reached[rank][..., shards[rank ^ 1]] = True
    return reached


KINDS = (
    "random",
    "full",
    "empty",
    "one rank asks everything",
    "everybody asks one rank",
    "own chunks only",
    "neighbours only",
)


class Expected:
    """Blocks that must travel, derived from all masks, block by block in Python."""

    def __init__(self, masks: torch.Tensor, shards: list[list[int]], topology: Topology):
        size = len(shards)
        owner = {chunk: rank for rank, ids in enumerate(shards) for chunk in ids}
        self.needs: list[set[Block]] = []
        for rank in range(size):
            asked = [tuple(where) for where in masks[rank].nonzero().tolist()]
            self.needs.append({where for where in asked if owner[where[2]] != rank})
        # (sender, receiver, block), once each.
        self.messages: set[tuple[int, int, Block]] = set()
        for rank in range(size):
            node = rank // topology.ranks_per_node
            for block in self.needs[rank]:
                source = owner[block[2]]
                if source // topology.ranks_per_node != node:
                    relay = node * topology.ranks_per_node + source % topology.ranks_per_node
                    self.messages.add((source, relay, block))
                    source = relay
                if source != rank:
                    self.messages.add((source, rank, block))
        received = [{(source, block) for source, to, block in self.messages if to == rank} for rank in range(size)]
        direct = [{block for source, block in blocks if owner[block[2]] == source} for blocks in received]
        self.held = max(map(len, direct))
        if any(owner[block[2]] != source for source, _, block in self.messages):  # what is forwarded lands elsewhere
            self.held = max(len(direct[rank]) + len(self.needs[rank]) for rank in range(size))
        self.leaving = {(source, block) for source, _, block in self.messages if owner[block[2]] == source}
        self._ranks_per_node = topology.ranks_per_node

    def blocks(self, link: str, *, sender: int | None = None, receiver: int | None = None) -> int:
        return sum(
            (source // self._ranks_per_node == target // self._ranks_per_node) == (link == "fast")
            and sender in (None, source)
            and receiver in (None, target)
            for source, target, _ in self.messages
        )

    def busiest(self, link: str) -> int:
        ranks = range(len(self.needs))
        return max(max(self.blocks(link, sender=r), self.blocks(link, receiver=r)) for r in ranks)


def exchanges() -> list[str]:
    """All kinds of masks, layouts and nodes."""
    size = dist.get_world_size()
    generator = same_generator()
    found = []
    divisors = [count for count in range(1, size + 1) if size % count == 0]
    for kind, layout, ranks_per_node in itertools.product(KINDS, ("zigzag", "contiguous"), divisors):
        wrong = one_exchange(kind, layout, find_topology(dist.group.WORLD, ranks_per_node), generator)
        found += [f"{kind}, {layout}, {ranks_per_node} ranks per node: {what}" for what in wrong]
    return found


def one_exchange(kind: str, layout: str, topology: Topology, generator: torch.Generator) -> list[str]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    n = size * CHUNKS_PER_RANK
    shard = shard_of(group, layout)
    shards = [shard.chunks_of(r).ids.tolist() for r in range(size)]
    masks = masks_of_all_ranks(kind, shards, generator)
    expected = Expected(masks, shards, topology)
    wrong = []

    def check(name: str, got: Any, wanted: Any) -> None:
        if got != wanted:
            wrong.append(f"{name} is {got}, not {wanted}")

    reached = masks[rank].to(device())
    plan = make_plan(reached.transpose(0, 2).contiguous().transpose(0, 2), shard, topology)
    same = make_plan(reached, shard, topology)
    check("strides", (plan.addresses.tolist(), plan.direct), (same.addresses.tolist(), same.direct))
    blocks = [(a // n // HEADS, a // n % HEADS, a % n) for a in plan.addresses.tolist()]
    check("needed", sorted(blocks), sorted(expected.needs[rank]))

    # Whole K and V the same at every rank; this rank's shard, NaN where the plan leaves blocks at home.
    whole = torch.randn(2, BATCH, HEADS, n, CHUNK, HEAD_DIM, generator=generator, dtype=torch.float64)
    whole = whole.to(device())
    own = whole[:, :, :, shards[rank]].clone()
    for index, head, slot in itertools.product(range(BATCH), range(HEADS), range(CHUNKS_PER_RANK)):
        if (rank, (index, head, shards[rank][slot])) not in expected.leaving:
            own[:, index, head, slot] = torch.nan
    k, v = own.permute(1, 3, 4, 0, 2, 5).flatten(1, 2).unbind(2)  # [B, S, Hkv, D], interleaved in memory
    with counted(topology) as given:
        kv, addresses = fetch(k, v, plan, shard, unnoticed).wait(), plan.addresses
    sent = plan.sent_bytes(CHUNK, HEAD_DIM, k.dtype)
    for link in ("fast", "slow"):
        wanted = expected.blocks(link, sender=rank) * BLOCK_BYTES
        check(f"bytes sent over {link} links", (getattr(given, link), getattr(sent, link)), (wanted, wanted))
        check(f"blocks of the busiest over {link} links", getattr(plan.busiest, link), expected.busiest(link))
    check("blocks held by the busiest", plan.busiest.held, expected.held)
    check("order", addresses.tolist(), plan.addresses.tolist())
    check("contiguous", kv.is_contiguous(), True)
    fetched = [torch.equal(kv[i], whole[:, index, head, chunk]) for i, (index, head, chunk) in enumerate(blocks)]
    check("fetched", (len(kv), all(fetched)), (len(blocks), True))

    # Gradients of everybody's blocks, whole numbers so that any order of sums is exact.
    shape = size, *whole.shape
    gradients = torch.randint(-99, 99, shape, generator=generator).to(torch.float64) * masks[:, None, ..., None, None]
    gradients = gradients.to(device())
    gradients[rank][:, :, :, shards[rank]] += 0.5  # the own share, which does not travel
    summands = torch.stack([gradients[rank][:, b, h, c] for b, h, c in blocks]) if blocks else kv
    own_share = gradients[rank][:, :, :, shards[rank]].permute(0, 1, 3, 4, 2, 5).flatten(2, 3).contiguous()
    dense = gradients.sum(0)[:, :, :, shards[rank]].permute(0, 1, 3, 4, 2, 5).flatten(2, 3)
    with counted(topology) as given:
        summed = returned_to(own_share, summands, plan, shard)
    returned = plan.returned_bytes(CHUNK, HEAD_DIM, summands.dtype)
    for link in ("fast", "slow"):
        wanted = expected.blocks(link, receiver=rank) * BLOCK_BYTES
        check(f"bytes returned over {link} links", (getattr(given, link), getattr(returned, link)), (wanted, wanted))
    check("gradients", torch.equal(summed, dense), True)
    return wrong


def same_bits_in_every_run() -> list[bool]:
    """Gradients whose sums depend on their order, sent home several times."""
    size, rank, generator = dist.get_world_size(), dist.get_rank(), same_generator()
    shard = shard_of(dist.group.WORLD, "zigzag")
    found = []
    for ranks_per_node in (2, size):
        masks = masks_of_all_ranks("full", [[]] * size, generator)
        plan = make_plan(masks[rank].to(device()), shard, Topology(size, ranks_per_node))
        gradient = torch.randn(len(plan.addresses), 2, CHUNK, HEAD_DIM, device=device())
        own = torch.randn(2, BATCH, CHUNKS_PER_RANK * CHUNK, HEADS, HEAD_DIM, device=device())
        first, *others = (returned_to(own.clone(), gradient, plan, shard) for _ in range(3))
        found += [torch.equal(first, other) for other in others]
    return found


def one_rank_alone() -> dict[str, Any]:
    """A group of one: nothing travels, and the own gradient is what it was."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    shard = shard_of(groups[dist.get_rank()], "zigzag")
    topology = find_topology(shard.group)
    with pytest.raises(ValueError, match="reached has 5 chunks, but 1 ranks hold 4 each"):
        make_plan(torch.ones(1, HEADS, 5, dtype=torch.bool), shard, topology)
    plan = make_plan(torch.ones(1, HEADS, CHUNKS_PER_RANK, dtype=torch.bool), shard, topology)
    k = torch.randn(1, CHUNKS_PER_RANK * CHUNK, HEADS, HEAD_DIM)
    kv, addresses = fetch(k, k, plan, shard, unnoticed).wait(), plan.addresses
    own = torch.randn(2, *k.shape)
    same = torch.equal(returned_to(own.clone(), kv, plan, shard), own)
    dist.barrier()  # rank 0 keeps the addresses of groups that others are still about to make
    return {"blocks": len(addresses), "same": same, "idle": plan.is_idle, "coverage": plan.coverage}


def topology_by_host_name() -> list[Any]:
    """All ranks are on this machine."""
    found = find_topology(dist.group.WORLD)
    return [found.ranks_per_node, found.is_two_level, find_topology(dist.group.WORLD) is found]


def timing_of_a_transfer() -> list[float]:
    """(known before waiting, known after, transfer, waited) while this rank computes for 0.2 s."""
    shard = shard_of(dist.group.WORLD, "contiguous")
    size = dist.get_world_size()
    plan = make_plan(torch.ones(1, HEADS, size * CHUNKS_PER_RANK, dtype=torch.bool), shard, Topology(size, size))
    k = torch.randn(1, CHUNKS_PER_RANK * CHUNK, HEADS, HEAD_DIM)
    transfer = fetch(k, k, plan, shard, unnoticed)
    before = transfer.timing.is_known()
    time.sleep(0.2)
    transfer.wait()
    return [before, transfer.timing.is_known(), *transfer.timing.seconds()]


def survivors(moment: str, dies: bool, timeout: float) -> list[Any]:
    """The last rank dies or stops for long; what the others are told, and after how many seconds."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(timeout=timedelta(seconds=timeout))
    shard = shard_of(group, "contiguous")
    reached = torch.ones(1, HEADS, size * CHUNKS_PER_RANK, dtype=torch.bool)
    k = torch.randn(1, CHUNKS_PER_RANK * CHUNK, HEADS, HEAD_DIM)
    topology = Topology(size, 2)

    def be_lost(now: str) -> None:
        if now == moment and rank == size - 1:
            if dies:
                time.sleep(1)  # until the others are through with what came before
                os._exit(1)
            time.sleep(timeout + 3)

    make_plan(reached, shard, topology)  # the group's connections are there
    start = time.monotonic()
    try:
        be_lost("plan")
        plan = make_plan(reached, shard, topology)
        be_lost("fetch")
        kv = fetch(k, k, plan, shard, unnoticed).wait()
        be_lost("gradients")
        returned_to(torch.zeros(2, *k.shape), kv, plan, shard)
    except ExchangeError as error:
        return [str(error), time.monotonic() - start]
    return ["no error", time.monotonic() - start]

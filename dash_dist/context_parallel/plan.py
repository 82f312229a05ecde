"""Plan of a selective exchange: the blocks of K and V that go from rank to rank, made before any of them moves.

Knows ranks, chunk ids and selected chunks; does not know the attention, and holds no K or V.

A *block* is one chunk of one KV head of one sequence of the batch; its address is
(index in the batch x Hkv + KV head) x n + chunk id, for n chunks in the whole sequence. They travel in up to two hops:

1. *direct*: from their owner to the ranks of its node that need them, and, once per node, to the rank of the owner's
   column in every other node where any rank needs them;
2. *forward*: from there to the ranks of that node that need them.

With links of one kind (one node, or one rank per node) the direct hop does everything. Needs travel the other way as
masks of one byte per block. Gradients return along the reversed hops, summed where blocks had been forwarded.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors
from dash_dist.context_parallel.shard import Shard
from dash_dist.cost_model.exchange import Busiest
from dash_dist.cost_model.topology import Topology
from dash_kernels.chunks import ChunkGrid

PLANNING = "the plan of the exchange"


@dataclass(frozen=True)
class Hop:
    """Blocks that this rank sends to and receives from every rank of the group, in rank order."""

    send: tuple[int, ...]
    receive: tuple[int, ...]


@dataclass(frozen=True)
class Forwarding:
    """The second hop.

    relayed: int64 [sent], index among the directly received blocks of each block sent on, in the order of sending.
    kept:    int64 [kept], index among the directly received blocks of those that this rank needs itself.
    """

    hop: Hop
    relayed: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True)
class PerLink:
    """Amount by link: fast within a node, slow between nodes."""

    fast: int
    slow: int

    @property
    def total(self) -> int:
        return self.fast + self.slow


@dataclass(frozen=True)
class Plan:
    """Blocks that one rank sends and receives. Immutable: forward, backward and recomputation share it.

    addresses:  int64 [blocks], the blocks this rank needs, each once, in order of arrival.
    places:     int64 [3, sent], the own blocks that it sends directly, see `blocks`.
    forwarding: None if no rank of the group forwards anything.
    reachable:  number of blocks of other ranks that this rank's queries could have selected. In every document of
                which it holds chunks, these are the ones before its last own chunk.
    """

    topology: Topology
    rank: int
    addresses: torch.Tensor
    places: torch.Tensor
    direct: Hop
    forwarding: Forwarding | None
    busiest: Busiest
    reachable: int

    @property
    def is_idle(self) -> bool:
        """True if no rank of the group needs a block of another one."""
        return self.busiest.fast == self.busiest.slow == 0

    @property
    def coverage(self) -> float:
        """Needed / reachable blocks of other ranks; 0 if none are reachable."""
        return len(self.addresses) / self.reachable if self.reachable else 0.0

    def sent_bytes(self, chunk_size: int, head_dim: int, dtype: torch.dtype) -> PerLink:
        """Bytes that this rank sends when K and V of `dtype` are fetched, exactly."""
        return self._bytes([hop.send for hop in self._hops()], chunk_size, head_dim, dtype)

    def returned_bytes(self, chunk_size: int, head_dim: int, dtype: torch.dtype) -> PerLink:
        """Bytes that this rank sends when their gradients of `dtype` return, exactly."""
        return self._bytes([hop.receive for hop in self._hops()], chunk_size, head_dim, dtype)

    def _hops(self) -> list[Hop]:
        return [self.direct] if self.forwarding is None else [self.direct, self.forwarding.hop]

    def _bytes(self, counts: list[tuple[int, ...]], chunk_size: int, head_dim: int, dtype: torch.dtype) -> PerLink:
        block_bytes = 2 * chunk_size * head_dim * dtype.itemsize
        within = self.topology.node_ranks(self.rank)
        total = sum(map(sum, counts))
        fast = sum(sum(by_rank[within.start : within.stop]) for by_rank in counts)
        return PerLink(fast * block_bytes, (total - fast) * block_bytes)


def make_plan(reached: torch.Tensor, shard: Shard, topology: Topology) -> Plan:
    """Makes the plan of a rank whose queries selected the chunks `reached`, bool [B, Hkv, n], own ones included or not.

    A collective call: every rank of the group, with equal shapes and topologies. It costs an all-to-all of B x Hkv x n
    bytes (two if nodes have several ranks) and an all-reduce of five numbers, and waits for the device once.

    Raises ExchangeError when a rank of the group is dead or late.
    """
    batch, heads, n = reached.shape
    if n != shard.size * shard.chunks_per_rank:
        raise ValueError(f"reached has {n} chunks, but {shard.size} ranks hold {shard.chunks_per_rank} each")
    needs = _by_owner(reached, shard)
    masks = _two_level_masks(needs, shard, topology) if topology.is_two_level else _flat_masks(needs, shard)
    counts = _count(masks, needs, shard, topology)

    # Blocks of all owners are numbered owner by owner, the order in which the direct hop brings them.
    arriving = masks.direct_in.flatten().nonzero_static(size=sum(counts.direct.receive))[:, 0]
    leaving = masks.direct_out.nonzero_static(size=sum(counts.direct.send))[:, 1]
    forwarding = None
    needed = arriving
    if counts.forward is not None:
        _, column = topology.place(shard.rank)

        def numbered(node: torch.Tensor, column: torch.Tensor | int, block: torch.Tensor) -> torch.Tensor:
            return (node * topology.ranks_per_node + column) * needs.shape[1] + block

        _, node, block = masks.forward_out.nonzero_static(size=sum(counts.forward.send)).unbind(1)
        arrival = masks.direct_in.flatten().cumsum(0) - 1  # index of arrival in the direct hop
        relayed = arrival[numbered(node, column, block)]
        kept = needs.flatten()[arriving].nonzero_static(size=counts.kept)[:, 0]
        forwarding = Forwarding(counts.forward, relayed, kept)
        neighbour, node, block = masks.forward_in.nonzero_static(size=sum(counts.forward.receive)).unbind(1)
        needed = torch.cat((numbered(node, neighbour, block), arriving[kept]))
    return Plan(
        topology,
        shard.rank,
        _addresses(needed, needs.shape[1], shard),
        _places(leaving, heads, shard.chunks_per_rank),
        counts.direct,
        forwarding,
        counts.busiest,
        batch * heads * reachable_chunks(shard.chunks, n),
    )


@functools.lru_cache(maxsize=64)
def reachable_chunks(chunks: ChunkGrid, n: int) -> int:
    """Number of chunks outside a shard, of n, that queries of the shard may select."""
    steps = torch.zeros(n + 1, dtype=torch.int64)  # +1 where a chunk's reach begins, -1 at the chunk itself
    steps.index_add_(0, chunks.firsts.long(), torch.ones(len(chunks), dtype=torch.int64))
    steps.index_add_(0, chunks.ids.long(), -torch.ones(len(chunks), dtype=torch.int64))
    within = steps.cumsum(0) > 0
    within[chunks.ids.long()] = False
    return int(within.sum())


@dataclass(frozen=True)
class _Masks:
    """Masks of travelling blocks, uint8. Blocks of an owner are numbered (index in the batch, KV head, slot).

    direct_out, direct_in: [size, blocks], own blocks to send to a rank; an owner's blocks to receive from it.
    forward_out:           [ranks_per_node, nodes, blocks], to a rank of this node, blocks of this rank's column.
    forward_in:            [ranks_per_node, nodes, blocks], from a rank of this node, blocks of that rank's column.
    """

    direct_out: torch.Tensor
    direct_in: torch.Tensor
    forward_out: torch.Tensor
    forward_in: torch.Tensor


@dataclass(frozen=True)
class _Counts:
    """Numbers that the host needs of the masks. kept: directly received blocks that this rank needs itself."""

    direct: Hop
    forward: Hop | None
    kept: int
    busiest: Busiest


def _by_owner(reached: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Blocks of other ranks that this rank needs, uint8 [size, blocks of an owner]."""
    ids = shard.gathered_chunks.on(reached.device)[0]
    by_owner = reached.to(torch.uint8).index_select(2, ids).unflatten(2, (shard.size, -1))
    needs = by_owner.permute(2, 0, 1, 3).flatten(1).contiguous()
    needs[shard.rank] = 0
    return needs


def _flat_masks(needs: torch.Tensor, shard: Shard) -> _Masks:
    everyone = [1] * shard.size
    nothing = needs.new_empty(0, 1, needs.shape[1])
    return _Masks(_exchange(needs, everyone, shard), needs, nothing, nothing)


def _two_level_masks(needs: torch.Tensor, shard: Shard, topology: Topology) -> _Masks:
    grid = topology.nodes, topology.ranks_per_node
    node, column = topology.place(shard.rank)
    wanted = needs.unflatten(0, grid).transpose(0, 1).contiguous()  # [columns, nodes, blocks]

    # Within the node: every rank asks the rank in a column for all blocks of that column.
    within, across = topology.node_ranks(shard.rank), topology.column_ranks(shard.rank)
    rows = [topology.nodes if rank in within else 0 for rank in range(shard.size)]
    asked = _exchange(wanted.flatten(0, 1), rows, shard).unflatten(0, wanted.shape[:2])  # [asking, nodes, blocks]

    # Across nodes: that rank asks the owners for the union of the needs of its node.
    by_node = asked.amax(0)  # the own node's entries are overwritten below
    rows = [1 if rank in across else 0 for rank in range(shard.size)]
    asked_by_nodes = _exchange(by_node, rows, shard)

    direct_out, direct_in = torch.zeros_like(needs), torch.zeros_like(needs)
    direct_out.unflatten(0, grid)[:, column] = asked_by_nodes
    direct_out.unflatten(0, grid)[node] = asked[:, node]
    direct_in.unflatten(0, grid)[:, column] = by_node
    direct_in.unflatten(0, grid)[node] = wanted[:, node]
    for forward in (asked, wanted):  # only other columns and nodes remain for the second hop
        forward[column] = 0
        forward[:, node] = 0
    return _Masks(direct_out, direct_in, asked, wanted)


def _exchange(rows: torch.Tensor, counts: list[int], shard: Shard) -> torch.Tensor:
    """Sends counts[r] of the rows, in rank order, to rank r, and receives as many from it."""
    received = torch.empty_like(rows)
    with exchange_errors(shard.group, PLANNING):
        dist.all_to_all_single(received, rows, counts, counts, group=shard.group)
    return received


def _count(masks: _Masks, needs: torch.Tensor, shard: Shard, topology: Topology) -> _Counts:
    """Counts the travelling blocks on the host, by one copy; numbers equal at all ranks come from an all-reduce."""
    within = topology.node_ranks(shard.rank)
    direct = torch.stack((masks.direct_out.sum(1), masks.direct_in.sum(1)))  # [out and in, size]
    forward = torch.stack((masks.forward_out.sum((1, 2)), masks.forward_in.sum((1, 2))))  # [out and in, ranks_per_node]
    kept = (needs * masks.direct_in).sum()
    near, forwarded = direct[:, within.start : within.stop].sum(1), forward.sum(1)
    slow = direct.sum(1) - near
    arrived = direct[1].sum()
    busiest = torch.stack(
        ((near + forwarded).amax(), slow.amax(), forwarded.amax(), arrived, arrived + forwarded[1] + kept)
    )
    with exchange_errors(shard.group, PLANNING):
        dist.all_reduce(busiest, dist.ReduceOp.MAX, group=shard.group)

    numbers = iter(torch.cat((direct.flatten(), forward.flatten(), kept[None], busiest)).tolist())

    def take(count: int) -> tuple[int, ...]:
        return tuple(itertools.islice(numbers, count))

    direct_hop = Hop(take(shard.size), take(shard.size))
    by_neighbour = take(forward.shape[1]), take(forward.shape[1])
    own_kept, fast_blocks, slow_blocks, anything_forwarded, held, held_with_forwarding = take(6)
    forward_hop = None
    if anything_forwarded:
        before, after = (0,) * within.start, (0,) * (shard.size - within.stop)
        forward_hop = Hop(*(before + counts + after for counts in by_neighbour))
        held = held_with_forwarding
    return _Counts(direct_hop, forward_hop, own_kept, Busiest(fast_blocks, slow_blocks, held))


def _addresses(needed: torch.Tensor, blocks_per_rank: int, shard: Shard) -> torch.Tensor:
    """Addresses of blocks numbered owner by owner."""
    n = shard.size * shard.chunks_per_rank
    owner, block = needed // blocks_per_rank, needed % blocks_per_rank
    row, slot = block // shard.chunks_per_rank, block % shard.chunks_per_rank
    ids = shard.gathered_chunks.on(needed.device)[0]
    return row * n + ids[owner * shard.chunks_per_rank + slot]


def _places(blocks: torch.Tensor, heads: int, slots: int) -> torch.Tensor:
    """(index in the batch, slot, KV head) of own blocks, int64 [3, blocks]."""
    return torch.stack((blocks // (heads * slots), blocks % slots, blocks // slots % heads))

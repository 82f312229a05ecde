"""Halo of a shard: the chunks before each stretch of its own that windows reach, from the ranks that hold them.

Knows documents, chunks and ranks; does not know the attention. All ranks work out the same halos from the layout, so
that no collective is needed to plan them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.layout import gathered_chunks, shard_chunks
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.transfer import Steps, Transfer, all_to_all
from dash_dist.cost_model.topology import Topology
from dash_kernels.chunks import ChunkGrid
from dash_kernels.spec import accumulation_dtype
from dash_kernels.window import Segments

KEYS_AND_VALUES, GRADIENTS = "K and V of the windows' earlier chunks", "gradients of the windows' earlier K and V"


@dataclass(frozen=True)
class Stretch:
    """Consecutive own chunks of one document, and the number of chunks before them that their windows reach."""

    slots: range
    first_chunk: int
    halo: int

    @property
    def halo_chunks(self) -> range:
        """Ids of the chunks before the stretch."""
        return range(self.first_chunk - self.halo, self.first_chunk)


def stretches(chunks: ChunkGrid, chunks_back: int) -> list[Stretch]:
    """Cut a shard's chunks, in their order, where the next one is not the next of the same document."""
    ids, firsts = chunks.ids.long(), chunks.firsts.long()
    begins = torch.ones(len(ids), dtype=torch.bool)
    begins[1:] = (ids.diff() != 1) | (ids[1:] == firsts[1:])
    starts = begins.nonzero()[:, 0].tolist()
    return [
        Stretch(range(start, end), int(ids[start]), min(chunks_back, int(ids[start] - firsts[start])))
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]


@dataclass(frozen=True, eq=False)
class HaloPlan:
    """Chunks that one rank sends, receives and puts together.

    send, receive: chunks to and from every rank, in rank order.
    sent:     int64 [sum(send)], own slots.
    band:     int64 [chunks of the band], places in (own, received chunks): of every stretch its halo, then itself.
    own:      int64 [own chunks], the place in the band of each.
    halos:    parts of the band that are halos, none of which holds a chunk twice.
    segments: queries and keys of the stretches, in tokens.
    is_idle:  True if no rank of the group needs a chunk of another one.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    sent: torch.Tensor
    band: torch.Tensor
    own: torch.Tensor
    halos: tuple[slice, ...]
    segments: Segments
    is_idle: bool


@functools.lru_cache(maxsize=64)
def plan_halo(sequence: ChunkGrid, rank: int, size: int, layout: str, *, chunk_size: int, window: int) -> HaloPlan:
    """Plan the exchange of one rank for windows of `window` tokens. No collective.

    Args:
        sequence: all chunks of the sequence, whole ones.
    """
    per_rank = len(sequence) // size
    everywhere = gathered_chunks(sequence, size, layout)
    places = everywhere.slots_by_id(len(sequence), torch.device("cpu")).tolist()
    chunks_back = -(-(window - 1) // chunk_size)
    cuts = [stretches(shard_chunks(sequence, taker, size, layout), chunks_back) for taker in range(size)]
    needed = [_needed(cut, taker, places, per_rank) for taker, cut in enumerate(cuts)]  # places, of each rank

    def held_by(owner: int, taker: int) -> list[int]:
        return [place % per_rank for place in needed[taker] if place // per_rank == owner]

    sent = [held_by(rank, taker) for taker in range(size)]
    arrival = {place: per_rank + index for index, place in enumerate(needed[rank])}
    band: list[int] = []
    own: list[int] = []
    halos = []
    for stretch in cuts[rank]:
        at = [places[chunk] for chunk in stretch.halo_chunks]
        if at:
            halos.append(slice(len(band), len(band) + len(at)))
        band += [place % per_rank if place // per_rank == rank else arrival[place] for place in at]
        own += range(len(band), len(band) + len(stretch.slots))
        band += stretch.slots
    return HaloPlan(
        send=tuple(map(len, sent)),
        receive=tuple(len(held_by(owner, rank)) for owner in range(size)),
        sent=torch.tensor([slot for slots in sent for slot in slots], dtype=torch.int64),
        band=torch.tensor(band, dtype=torch.int64),
        own=torch.tensor(own, dtype=torch.int64),
        halos=tuple(halos),
        segments=Segments(
            [len(stretch.slots) * chunk_size for stretch in cuts[rank]],
            [(stretch.halo + len(stretch.slots)) * chunk_size for stretch in cuts[rank]],
        ),
        is_idle=not any(needed),
    )


@functools.lru_cache(maxsize=64)
def on_device(plan: HaloPlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sent`, `band` and `own` of a plan on a device, uploaded once."""
    sent, band, own = (x.to(device) for x in (plan.sent, plan.band, plan.own))
    return sent, band, own


def _needed(cut: list[Stretch], rank: int, places: list[int], per_rank: int) -> list[int]:
    """Places, owner by owner, of the chunks that a rank receives."""
    wanted = {places[chunk] for stretch in cut for chunk in stretch.halo_chunks}
    return sorted(place for place in wanted if place // per_rank != rank)


def with_halo(
    k: torch.Tensor, v: torch.Tensor, shard: Shard, window: int, topology: Topology, traffic: Traffic
) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """K and V of a shard [B, S, Hkv, D] with the halo before each stretch, [B, S', Hkv, D], and the segments.

    A collective call, as is its backward pass, which returns the halos' gradients to their owners.

    Raises:
        ExchangeError: a rank of the group died, or did not answer within the group's timeout.
    """
    sequence, chunk_size = shard.sequence, shard.chunk_size
    plan = plan_halo(sequence, shard.rank, shard.size, shard.layout, chunk_size=chunk_size, window=window)
    keys, values = _WithHalo.apply(k, v, _Call(shard, plan, topology, traffic))
    return keys, values, plan.segments


@dataclass(frozen=True)
class _Call:
    """Arguments of the exchange besides its tensors."""

    shard: Shard
    plan: HaloPlan
    topology: Topology
    traffic: Traffic

    def travel(self, rows: torch.Tensor, *, home: bool, dense_bytes: int) -> torch.Tensor:
        """Rows of chunks to the ranks that need them, or of their gradients to their owners; returns what arrives."""
        send, receive = (self.plan.receive, self.plan.send) if home else (self.plan.send, self.plan.receive)
        self.traffic.planned(sum(send) * rows[:1].nbytes, dense=dense_bytes)
        if self.plan.is_idle:
            return rows

        def sent(counts: Any, row_bytes: int) -> None:
            self.traffic.sent_rows(counts, row_bytes, self.shard.rank, self.topology)

        name = GRADIENTS if home else KEYS_AND_VALUES
        steps: Steps = all_to_all(rows, send, receive, self.shard.group, name, sent)
        transfer = Transfer(steps, (rows,))
        self.traffic.started(transfer.timing)
        return transfer.wait()


class _WithHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
        sent, band, _ = on_device(call.plan, k.device)
        own = [x.unflatten(1, (-1, call.shard.chunk_size)).transpose(0, 1) for x in (k, v)]  # [chunks, B, C, Hkv, D]
        rows = torch.stack([x[sent] for x in own], dim=1)  # [sent, 2, B, C, Hkv, D]
        arrived = call.travel(rows, home=False, dense_bytes=2 * k.nbytes * (call.shard.size - 1))
        ctx.call = call
        keys, values = (
            torch.cat((x, arrived[:, index]))[band].transpose(0, 1).flatten(1, 2) for index, x in enumerate(own)
        )
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        plan, shard = call.plan, call.shard
        given, device = gradients[0].dtype, gradients[0].device
        dtype, chunks = accumulation_dtype(given), shard.chunks_per_rank
        sent, band, own = on_device(plan, device)
        of_band = torch.stack([x.unflatten(1, (-1, shard.chunk_size)).transpose(0, 1) for x in gradients], dim=1)
        total = of_band.new_zeros(chunks + sum(plan.receive), *of_band.shape[1:], dtype=dtype)  # [..., 2, B, C, Hkv, D]
        total[:chunks] = of_band[own].to(dtype)
        # No halo holds a chunk twice, nor does a rank send one twice. Adding one after the other fixes the sums' order.
        for halo in plan.halos:
            total.index_add_(0, band[halo], of_band[halo].to(dtype))
        home, rows = total[:chunks], total[chunks:]
        returned = call.travel(rows, home=True, dense_bytes=home.nbytes * (shard.size - 1))
        for slots, contribution in zip(sent.split(plan.send), returned.split(plan.send), strict=True):
            home.index_add_(0, slots, contribution)
        dk, dv = (home[:, index].transpose(0, 1).flatten(1, 2).to(given) for index in range(2))
        return dk, dv, None

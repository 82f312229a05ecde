"""Jobs in which one rank errs, dies, or makes other calls than the others."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dash_dist import dash_attention, split_sequence
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.context_parallel.transfer import Transfer
from tests.context_parallel.attention_cases import CHUNK, HEAD_DIM, SETTINGS, device, replaced, same_inputs


def errors_at_every_rank() -> dict[str, str]:
    """One rank's mistake is everybody's ValueError."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()

    def call(length: int, batch: int = 1, cu_seqlens: list[int] | None = None, **change: Any) -> str:
        """length: tokens of this rank's shard."""
        q, k, v = (torch.randn(batch, length, heads, HEAD_DIM, device=device()) for heads in (4, 2, 2))
        settings = {"chunk_size": CHUNK, "cp_group": group} | change
        if cu_seqlens is not None:
            settings["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        try:
            dash_attention(q, k, v, torch.zeros(2, HEAD_DIM, device=device()), **settings)
        except ValueError as error:
            return str(error)
        return "no error"

    whole = 4 * CHUNK * size
    return {
        "not a multiple": call(3 * CHUNK),
        "half a chunk": call(CHUNK // 2, layout="contiguous"),
        "one chunk in zigzag": call(CHUNK),
        "one chunk": call(CHUNK, layout="contiguous"),
        "one rank's alpha": call(4 * CHUNK, alpha=3.0 if rank == size - 1 else 1.5),
        "different lengths": call(4 * CHUNK if rank else 2 * CHUNK),
        "different layouts": call(4 * CHUNK, layout="zigzag" if rank else "contiguous"),
        "different exchanges": call(4 * CHUNK, exchange="ring" if rank else "allgather"),
        "unknown layout": call(4 * CHUNK, layout="spiral"),
        "unknown exchange": call(4 * CHUNK, exchange="pigeon"),
        "ranks per node": call(4 * CHUNK, ranks_per_node=size + 1),
        "different ranks per node": call(4 * CHUNK, ranks_per_node=None if rank else size),
        "incomplete document": call(4 * CHUNK, cu_seqlens=[0, 3 * CHUNK + 5, whole]),
        "incomplete document at one rank": call(4 * CHUNK, cu_seqlens=[0, 3 * CHUNK + 5 * (rank == 1), whole]),
        "different documents": call(4 * CHUNK, cu_seqlens=[0, (1 + rank) * CHUNK, whole]),
        "documents at one rank": call(4 * CHUNK, cu_seqlens=[0, CHUNK, whole] if rank else None),
        "documents of a shard": call(4 * CHUNK, cu_seqlens=[0, CHUNK, whole // size]),
        "documents in a batch": call(4 * CHUNK, batch=2, cu_seqlens=[0, CHUNK, whole]),
        "good afterwards": call(4 * CHUNK, cu_seqlens=[0, CHUNK, CHUNK, whole]),
    }


def trios_or_pairs(ranks: int, timeout: float) -> tuple[dist.ProcessGroup, str]:
    """This rank's group of so many ranks, and the exchange of the group: three groups, one for each."""
    names = ("selective", "allgather", "ring")
    groups = [
        dist.new_group(list(range(first, first + ranks)), timeout=timedelta(seconds=timeout))
        for first in range(0, 3 * ranks, ranks)
    ]
    index = dist.get_rank() // ranks
    return groups[index], names[index]


class Step:
    """A forward pass, and the backward pass to it."""

    def __init__(self, group: dist.ProcessGroup, exchange: str):
        self.inputs = same_inputs(4 * dist.get_world_size(group), batch=1, group=group)
        self.group, self.exchange = group, exchange

    def forward(self) -> torch.Tensor:
        inputs = self.inputs
        shards = [split_sequence(x, self.group).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = dash_attention(*shards, inputs.summary_query, cp_group=self.group, exchange=self.exchange, **SETTINGS)
        self.graph = out, split_sequence(inputs.grad, self.group)
        return out

    def backward(self) -> None:
        out, grad = self.graph
        out.backward(grad)


def what_was_said(call: Callable[[], Any]) -> tuple[str, float]:
    """Message of the ExchangeError, and the seconds until it was raised."""
    start = time.monotonic()
    try:
        call()
    except ExchangeError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


def one_rank_has_one_more_micro_batch(timeout: float) -> tuple[str, float]:
    """Every other rank goes on to a second forward pass, the others to the first backward pass."""
    group, exchange = trios_or_pairs(2, timeout)
    first, second = Step(group, exchange), Step(group, exchange)
    first.forward()
    return what_was_said(first.backward if dist.get_rank(group) else second.forward)


def a_rank_dies_before_it_lands(moment: str, timeout: float) -> tuple[str, float]:
    """The last rank of every group, once its tensors are on their way."""
    group, exchange = trios_or_pairs(3, timeout)
    step = Step(group, exchange)
    step.forward()  # the group's connections are there

    def die(transfer: Transfer) -> torch.Tensor:
        os._exit(1)

    def forward_and_backward() -> None:
        step.forward()
        if moment == "backward":
            time.sleep(1)  # until all are through with their forward passes
        with replaced(Transfer, "wait", die if is_last else Transfer.wait):
            step.backward()

    is_last = dist.get_rank(group) == dist.get_world_size(group) - 1
    with replaced(Transfer, "wait", die if is_last and moment == "forward" else Transfer.wait):
        return what_was_said(forward_and_backward)

"""The ring exchange: K and V go round by point-to-point sends, the next shard in flight while the current one is used.

Knows who sends what to whom and when; does not know what is computed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from dash_dist.context_parallel.shard import Shard
from dash_kernels.spec import Part

KEYS_AND_VALUES, GRADIENTS = 0, 1  # tags: both kinds of message are on their way at once in the backward pass


def parts(k: torch.Tensor, v: torch.Tensor, shard: Shard) -> Iterator[Part]:
    """Every rank's k and v, the own ones first; the next arrive while the caller uses the yielded ones."""
    current = torch.stack((k, v))
    for step in range(shard.size):
        is_last = step == shard.size - 1
        flight = None if is_last else _Flight(current, shard, KEYS_AND_VALUES)
        yield Part(current[0], current[1], shard.chunks_of((shard.rank - step) % shard.size), whole=False)
        if flight is not None:
            current = flight.land()


def backward(
    k: torch.Tensor, v: torch.Tensor, shard: Shard, contribution_to: Callable[[Part], torch.Tensor]
) -> torch.Tensor:
    """Gradient [2, *k.shape] of this rank's k and v, summed over all ranks' queries.

    contribution_to(part) returns what this rank's queries add to the gradients of a part. The sum for a part follows
    the part around the ring, one step behind, and is complete when it reaches its owner.
    """
    flight = None
    for part in parts(k, v, shard):
        contribution = contribution_to(part)
        if flight is not None:
            contribution += flight.land()
        flight = _Flight(contribution, shard, GRADIENTS)
    assert flight is not None  # the ring has at least one rank
    return flight.land()


class _Flight:
    """A tensor on its way to the next rank while one like it comes from the previous rank."""

    def __init__(self, outgoing: torch.Tensor, shard: Shard, tag: int):
        self._outgoing = outgoing  # kept alive until the send is done
        if shard.size == 1:
            self._incoming, self._requests = outgoing, []
            return
        self._incoming = torch.empty_like(outgoing)
        to = dist.get_global_rank(shard.group, (shard.rank + 1) % shard.size)
        source = dist.get_global_rank(shard.group, (shard.rank - 1) % shard.size)
        send = dist.P2POp(dist.isend, outgoing, to, shard.group, tag)
        receive = dist.P2POp(dist.irecv, self._incoming, source, shard.group, tag)
        self._requests = dist.batch_isend_irecv([send, receive])

    def land(self) -> torch.Tensor:
        for request in self._requests:
            request.wait()
        return self._incoming

"""Ring exchange: K and V pass from rank to rank, the next shard in transfer while the current one is used.

Knows who sends what to whom and when; does not know the computation in between. In a backward pass K and V go round
twice: once for the gradients of queries, and once for those of keys, which follow one step behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors
from dash_dist.context_parallel.exchange_counters import Traffic
from dash_dist.context_parallel.plan import Plan
from dash_dist.context_parallel.shard import Shard
from dash_dist.context_parallel.transfer import Steps, Transfer
from dash_dist.cost_model.topology import Topology
from dash_kernels.spec import Part

KEYS_AND_VALUES, GRADIENTS = 0, 1  # tags: messages of both kinds travel at the same time
NAMES = ("K and V on their way round the ring", "gradients on their way round the ring")


class Ring:
    """An `exchange.Exchange` in which every rank sees every shard, and holds two of them at a time."""

    name = "ring"

    def __init__(self, shard: Shard, topology: Topology, plan: Plan | None = None):
        self._shard, self._topology, self.plan = shard, topology, plan

    def deliver(self, k: torch.Tensor, v: torch.Tensor, traffic: Traffic) -> RingDelivery:
        return RingDelivery(k, v, self._shard, self._topology, traffic)


class RingDelivery:
    """An `exchange.Delivery` in one part per rank: the own shard, then those of the ranks before it."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, shard: Shard, topology: Topology, traffic: Traffic):
        self._k, self._v, self._shard, self._topology, self._traffic = k, v, shard, topology, traffic

    def parts(self) -> Iterator[tuple[Part, bool]]:
        yield from self._round(dense=True)

    def _round(self, *, dense: bool) -> Iterator[tuple[Part, bool]]:
        """Yields K and V of every rank once. dense: these bytes count in `Traffic` as those of a dense exchange."""
        shard = self._shard
        current = torch.stack((self._k, self._v))
        for step in range(shard.size):
            last = step == shard.size - 1
            transfer = None if last else self._send_on(current, KEYS_AND_VALUES, dense=dense)
            yield Part(current[0], current[1], shard.chunks_of((shard.rank - step) % shard.size)), last
            if transfer is not None:
                current = transfer.wait()

    def gradients(self, contribution_to: Callable[[Part], torch.Tensor]) -> torch.Tensor:
        """The sum for a part follows the part around the ring, one step behind, and is complete at its owner."""
        transfer = None
        for part, last in self._round(dense=False):
            contribution = contribution_to(part)
            if transfer is not None:
                contribution += transfer.wait()
            if not last or self._shard.size > 1:
                transfer = self._send_on(contribution, GRADIENTS, dense=not last)
        return contribution if transfer is None else transfer.wait()

    def _send_on(self, outgoing: torch.Tensor, tag: int, *, dense: bool) -> Transfer:
        shard, topology = self._shard, self._topology
        transfer = Transfer(_steps_to_next_rank(outgoing, shard, tag), (outgoing,))
        rows = [0] * shard.size
        rows[(shard.rank + 1) % shard.size] = 1
        self._traffic.sent_rows(rows, outgoing.nbytes, shard.rank, topology)
        self._traffic.planned(outgoing.nbytes, dense=outgoing.nbytes if dense else 0)
        self._traffic.started(transfer.timing)
        return transfer


def _steps_to_next_rank(outgoing: torch.Tensor, shard: Shard, tag: int) -> Steps:
    incoming = torch.empty_like(outgoing)
    to = dist.get_global_rank(shard.group, (shard.rank + 1) % shard.size)
    source = dist.get_global_rank(shard.group, (shard.rank - 1) % shard.size)
    with exchange_errors(shard.group, NAMES[tag]):
        send = dist.P2POp(dist.isend, outgoing, to, shard.group, tag)
        receive = dist.P2POp(dist.irecv, incoming, source, shard.group, tag)
        requests = dist.batch_isend_irecv([send, receive])
    yield
    with exchange_errors(shard.group, NAMES[tag]):
        for request in requests:
            request.wait()
    return incoming

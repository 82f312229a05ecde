"""Transfers: tensors that travel while the caller computes, and the time the caller waited for them.

Knows streams and collectives; does not know what travels. On a GPU all work of a transfer is issued at once on a stream
of its own, packing and the waits between its hops included, and the host continues. On a CPU the first collective runs
while the caller computes; the rest runs inside `wait`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors
from dash_kernels.ranges import named_range

Steps = Generator[None, None, torch.Tensor]  # yields wherever it has to wait for a collective; returns the result
Sent = Callable[[Sequence[int], int], None]  # called with the rows that left for every rank, and the bytes of a row


class Transfer:
    """Runs steps in the background; `wait` returns their result.

    `inputs` are the tensors that the steps read and that the caller may free before it waits.
    """

    def __init__(self, steps: Steps, inputs: Sequence[torch.Tensor]):
        device = inputs[0].device
        self._steps = steps
        self._result: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self.timing = Timing(device)
        if device.type != "cuda":
            self.timing.issued.record()
            self._proceed()
            return
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.timing.issued.record()
            while self._result is None:
                self._proceed()
            self.timing.arrived.record()
            self._arrived = stream.record_event()
        for x in inputs:
            x.record_stream(stream)

    def wait(self) -> torch.Tensor:
        """Returns the result for use on the current stream. Call it once.

        Raises ExchangeError when a rank of the group is dead or late.
        """
        self.timing.called.record()
        while self._result is None:
            self._proceed()
        if self._arrived is None:
            self.timing.arrived.record()
        else:
            stream = torch.cuda.current_stream(self._result.device)
            stream.wait_event(self._arrived)  # does not wait for later transfers
            self._result.record_stream(stream)
        self.timing.resumed.record()
        self.timing.is_over = True
        return self._result

    def _proceed(self) -> None:
        try:
            with named_range("exchange"):
                next(self._steps)
        except StopIteration as end:
            if end.value is None:  # the steps ended by an error, which was raised then
                raise RuntimeError("a failed transfer has no result") from None
            self._result = end.value


class Timing:
    """Duration of a transfer that is over, and how long its caller waited for it.

    Four moments: the first work issued and the last work done; `wait` called and left. On a GPU they are moments of the
    device, in the order of its streams.
    """

    def __init__(self, device: torch.device):
        def moment() -> _Moment:
            return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else _HostMoment()

        self.issued, self.arrived, self.called, self.resumed = (moment() for _ in range(4))
        self.is_over = False

    def is_known(self) -> bool:
        """True once `wait` has returned and the GPU has reached that point. Does not block."""
        return self.is_over and self.resumed.query()

    def seconds(self) -> tuple[float, float]:
        """(transfer, waited) in seconds, once `is_known`: overlap is 1 - waited / transfer."""
        return self.issued.elapsed_time(self.arrived) / 1e3, self.called.elapsed_time(self.resumed) / 1e3


class _Moment(Protocol):
    """The part of torch.cuda.Event that Timing uses; times are milliseconds between recorded events."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, later: Any, /) -> float: ...


class _HostMoment:
    """A _Moment by the host's clock."""

    _seconds: float

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _HostMoment) -> float:
        return (later._seconds - self._seconds) * 1e3


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device, since transfers share its links. Its small kernels run before the attention's."""
    return torch.cuda.Stream(device, priority=-1)


def all_to_all(
    outgoing: torch.Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    name: str,
    sent: Sent,
    *,
    into: torch.Tensor | None = None,
) -> Steps:
    """Steps of one all-to-all of rows: send[r] of outgoing, in rank order, go to rank r; receive[r] come from it.

    Ranks with nothing to exchange exchange no message. Rows arrive in `into`, a new tensor if None.
    """
    incoming = outgoing.new_empty(sum(receive), *outgoing.shape[1:]) if into is None else into
    with exchange_errors(group, name):
        work = dist.all_to_all_single(incoming, outgoing, list(receive), list(send), group=group, async_op=True)
    sent(send, outgoing[:1].nbytes)
    yield
    with exchange_errors(group, name):
        work.wait()
    return incoming

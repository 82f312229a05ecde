"""Flights: tensors on their way while the caller computes, and how long it had to wait for them.

Knows streams and collectives; does not know what travels. On a GPU everything of a flight, packing and the waits
between its hops included, is issued at once on a stream of its own, and the host goes on. On a CPU the first collective
runs while the caller computes, and what comes after it runs when the flight lands.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dash_dist.context_parallel.errors import naming_the_exchange

Journey = Generator[None, None, torch.Tensor]  # stops wherever it has to wait for a collective
Sent = Callable[[Sequence[int], int], None]  # is told how many rows left for every rank, and the bytes of a row


class Flight:
    """Runs a journey beside the caller; `land` gives what it brings.

    `inputs` are the tensors that the journey reads and that the caller may let go of before the landing.
    """

    def __init__(self, journey: Journey, inputs: Sequence[torch.Tensor]):
        device = inputs[0].device
        self._journey = journey
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

    def land(self) -> torch.Tensor:
        """What the journey brings, for use on the current stream. Call it once.

        Raises ExchangeError when a rank of the group is dead or late.
        """
        self.timing.called.record()
        while self._result is None:
            self._proceed()
        if self._arrived is None:
            self.timing.arrived.record()
        else:
            stream = torch.cuda.current_stream(self._result.device)
            stream.wait_event(self._arrived)  # and not for flights that left later
            self._result.record_stream(stream)
        self.timing.resumed.record()
        self.timing.has_landed = True
        return self._result

    def _proceed(self) -> None:
        try:
            next(self._journey)
        except StopIteration as end:
            if end.value is None:  # it ended by an error, which was raised then
                raise RuntimeError("a flight that failed cannot land") from None
            self._result = end.value


class Timing:
    """How long a flight that has landed was under way, and how long its caller waited for it.

    Four moments: the journey's first work was issued, its last one done; land was called, the caller went on. On a GPU
    they are moments of the device, in the order of its streams.
    """

    def __init__(self, device: torch.device):
        def moment() -> _Moment:
            return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else _HostMoment()

        self.issued, self.arrived, self.called, self.resumed = (moment() for _ in range(4))
        self.has_landed = False

    def is_known(self) -> bool:
        """False while the GPU has not come to the landing, or the flight has not landed. Does not wait."""
        return self.has_landed and self.resumed.query()

    def seconds(self) -> tuple[float, float]:
        """(flight, waited) in seconds, once `is_known`: overlap is 1 - waited / flight."""
        return self.issued.elapsed_time(self.arrived) / 1e3, self.called.elapsed_time(self.resumed) / 1e3


class _Moment(Protocol):
    """What Timing needs of torch.cuda.Event, whose times are milliseconds between recorded events."""

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
    """One per device: flights follow each other on the links anyway. Its small kernels go before the attention's."""
    return torch.cuda.Stream(device, priority=-1)


def all_to_all(
    outgoing: torch.Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    what: str,
    sent: Sent,
    *,
    into: torch.Tensor | None = None,
) -> Journey:
    """One all-to-all of rows: send[r] of outgoing, in rank order, go to rank r, and receive[r] come from it.

    Ranks between which nothing travels exchange no message. `into` is where rows land, a new tensor if None.
    """
    incoming = outgoing.new_empty(sum(receive), *outgoing.shape[1:]) if into is None else into
    with naming_the_exchange(group, what):
        work = dist.all_to_all_single(incoming, outgoing, list(receive), list(send), group=group, async_op=True)
    sent(send, outgoing[:1].nbytes)
    yield
    with naming_the_exchange(group, what):
        work.wait()
    return incoming

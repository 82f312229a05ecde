"""Share of an exchange's communication that computation hides: a call as it is, its transfers alone, the rest alone.

    overlap = (t_compute + t_communication - t_both) / min(t_compute, t_communication)

An exchange starts *flights*: functions of its module that set tensors on their way and return an object whose `wait`
gives what came. One recorded call keeps every flight's arguments and what it brought. After that, the flights can be
made again without the computation between them, and the computation can be made with flights that bring at once what
they brought in the recorded call. Nothing of the exchange is rewritten for it, so what is measured is what runs.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from dash_dist.context_parallel import ring, selective
from tools.benchmarks.context_parallel.timing import Mark, Step


@dataclass(frozen=True)
class Site:
    """A function that starts flights, where its callers look it up: `owner.name`, of a module or a class. Called again
    with the same arguments it starts the same flight.
    """

    owner: ModuleType | type
    name: str


FLIGHTS: dict[str, tuple[Site, ...]] = {
    "selective": (Site(selective, "fetch"), Site(selective, "send_home")),
    "ring": (Site(ring.RingDelivery, "_send_on"),),
}


@dataclass
class _Flown:
    """A recorded flight: how it was started, and how it landed."""

    start: Callable[[], Any]
    flight: Any
    brought: Any = None


class Recording:
    """The flights of one call over an exchange, in the order in which they started."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._flown: list[_Flown] = []

    def record(self, step: Step) -> Step:
        """The call as it is, its flights kept in place of those of an earlier one."""

        def call(after_forward: Mark) -> Sequence[torch.Tensor]:
            self._flown.clear()
            with self._starting(self._record_flight):
                results = step(after_forward)
            if not self._flown:
                names = ", ".join(f"{site.owner.__name__}.{site.name}" for site in self._sites)
                raise RuntimeError(f"the call started no flight through {names}: name in FLIGHTS what starts them")
            return results

        return call

    def compute(self, step: Step) -> Step:
        """The same call with flights that have landed before they start. Its results are those of the recorded one."""

        def call(after_forward: Mark) -> Sequence[torch.Tensor]:
            recorded = iter(self._flown)
            with self._starting(lambda start: _Landed(next(recorded))):
                return step(after_forward)

        return call

    def communicate(self) -> Step:
        """The flights alone, each started when the one before has landed."""

        def call(after_forward: Mark) -> Sequence[torch.Tensor]:
            for flown in self._flown:
                flown.start().wait()
            after_forward()
            return ()

        return call

    def _record_flight(self, start: Callable[[], Any]) -> Any:
        flown = _Flown(start, start())
        self._flown.append(flown)
        return _Recorded(flown)

    @contextlib.contextmanager
    def _starting(self, flight_of: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
        """Every site gives flight_of(start), where start() is what it would have given."""
        with contextlib.ExitStack() as patches:
            for site in self._sites:
                instead = _instead_of(getattr(site.owner, site.name), flight_of)
                patches.enter_context(mock.patch.object(site.owner, site.name, instead))
            yield


def _instead_of(site: Callable[..., Any], flight_of: Callable[[Callable[[], Any]], Any]) -> Callable[..., Any]:
    return lambda *arguments, **keywords: flight_of(functools.partial(site, *arguments, **keywords))


class _Recorded:
    """A flight whose landing is kept."""

    def __init__(self, flown: _Flown) -> None:
        self._flown = flown

    def wait(self) -> Any:
        self._flown.brought = self._flown.flight.wait()
        return self._flown.brought

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flown.flight, name)


class _Landed:
    """A flight that brings at once what it brought when it was recorded."""

    def __init__(self, flown: _Flown) -> None:
        self._flown = flown

    def wait(self) -> Any:
        return self._flown.brought

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flown.flight, name)


@dataclass(frozen=True)
class OverlapTimes:
    """Milliseconds of every round, the slowest rank's: the call as it is, its flights alone, the computation alone."""

    both: list[float] = field(default_factory=list)
    communication: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)

    @property
    def overlap(self) -> float | None:
        """Overlap of the medians. Noise can carry it out of [0, 1]: see `spread`."""
        return (
            overlap(*(statistics.median(times) for times in (self.both, self.communication, self.compute)))
            if self.both
            else None
        )

    @property
    def spread(self) -> tuple[float, float] | None:
        """Least and largest overlap of a single round."""
        if not self.both:
            return None
        rounds = [overlap(*times) for times in zip(self.both, self.communication, self.compute, strict=True)]
        return min(rounds), max(rounds)


def overlap(both: float, communication: float, compute: float) -> float:
    """The share of the shorter of two times that is saved where both run together; 1: all of it, 0: none."""
    return (compute + communication - both) / min(compute, communication)


def alternate(
    both: Callable[[], float], communication: Callable[[], float], compute: Callable[[], float], rounds: int
) -> OverlapTimes:
    """Call the functions in turns; each returns the milliseconds of one call.

    Turns spread a drift of clocks evenly. A GPU at its power limit is faster after a pause, so communication alone
    comes before each of the two others.
    """
    times = OverlapTimes()
    for _ in range(rounds):
        before_both = communication()
        times.both.append(both())
        before_compute = communication()
        times.compute.append(compute())
        times.communication.append((before_both + before_compute) / 2)
    return times

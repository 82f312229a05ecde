"""The activities of a device in a trace of PyTorch's profiler, each with where it was launched.

Knows the chrome trace that `torch.profiler` exports. Does not know the parts of a step.

On a GPU an activity is a kernel, a copy or a memset. On a CPU it is an operator, for the time that it spends outside of
the operators that it calls, or a collective of gloo. An activity's context is the calls that it was launched in,
innermost first. Where such a call is of the backward pass, the context of the forward call that it belongs to follows.
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dash_dist.garbage import no_garbage_collection
from dash_dist.profiling.flops import moved_bytes, product_flops
from dash_dist.profiling.intervals import Interval, clipped, without
from dash_kernels.ranges import PREFIX

STEPS, STEP = "steps", "step"
"""Ranges of all profiled steps, and of each."""
ON_HOST = (PREFIX + "data", PREFIX + "optimizer")
"""Ranges whose time is the host's where the device has nothing to do."""

_ON_GPU = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_CALLS = frozenset(("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"))
_COLLECTIVES = ("nccl", "gloo:")
_BETWEEN_HOST_AND_GPU = ("Memcpy HtoD", "Memcpy DtoH")


@dataclass(frozen=True)
class Activity:
    """Work of a device.

    Attributes:
        pieces: when it ran, in microseconds.
        context: names of the calls that it was launched in, innermost first.
        flops: operations of a matrix product; None where not known.
        moved: bytes read and written; None where not known.
        on_host: a range of the host, which the device may wait for.
    """

    name: str
    pieces: tuple[Interval, ...]
    context: tuple[str, ...] = ()
    flops: float | None = None
    moved: float | None = None
    on_host: bool = False

    @property
    def length(self) -> float:
        """Microseconds."""
        return sum(end - start for start, end in self.pieces)

    @property
    def is_collective(self) -> bool:
        """Communication between ranks."""
        return self.name.lower().startswith(_COLLECTIVES)

    @property
    def level(self) -> int:
        """Level of `intervals.Busy`: 0 computation, 1 collectives and copies from and to the host, 2 the host."""
        if self.on_host:
            return 2
        return int(self.is_collective or self.name.startswith(_BETWEEN_HOST_AND_GPU))


@dataclass(frozen=True)
class Trace:
    """Activities of some steps, of the device and of the host.

    Attributes:
        window: from the start of the first step to the end of the last one, in microseconds.
        on_gpu: the activities are those of a GPU.
    """

    activities: Sequence[Activity]
    window: Interval
    steps: int
    on_gpu: bool


def read_trace(path: Path) -> Trace:
    """Read a file of `torch.profiler.profile.export_chrome_trace`, compressed or not.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, or has no range of steps.
    """
    content = path.read_bytes()
    with no_garbage_collection():  # among millions of objects none is garbage
        parsed = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
        events = parsed.get("traceEvents") if isinstance(parsed, dict) else None
        if not isinstance(events, list):
            raise ValueError(f"{path} has no traceEvents: name a trace of PyTorch's profiler")
        return trace_of(events)


def trace_of(events: Sequence[Mapping[str, Any]]) -> Trace:
    """Find the activities among the events of a trace. Raises ValueError for one without a range of steps."""
    calls = _Calls(events)
    window = next((call for call in calls.all() if call.name == PREFIX + STEPS), None)
    if window is None:
        raise ValueError(f"the trace has no range {PREFIX + STEPS!r}: make it with `dash-dist profile`")
    steps = sum(call.name == PREFIX + STEP for call in calls.all())
    on_device = [event for event in events if event.get("ph") == "X" and event.get("cat") in _ON_GPU]
    found = calls.gpu_activities(on_device) if on_device else calls.cpu_activities(window)
    inside = []
    for activity in itertools.chain(found, calls.host_activities()):
        pieces = tuple(clipped(activity.pieces, (window.start, window.end)))
        if pieces:
            inside.append(replace(activity, pieces=pieces))
    return Trace(inside, (window.start, window.end), steps, on_gpu=bool(on_device))


@dataclass(eq=False, slots=True)
class _Call:
    """A call on a thread of the host: an operator, a range or a launch."""

    name: str
    start: float
    end: float
    thread: Any
    is_operator: bool
    arguments: Mapping[str, Any]
    parent: _Call | None = None
    forward: _Call | None = None
    children: list[Interval] = field(default_factory=list)

    @property
    def computes(self) -> bool:
        """An operator of a library, and not autograd's or Python's frame around some."""
        frame = ("autograd::", "torch::autograd", "profiler::")
        return self.is_operator and "::" in self.name and not self.name.startswith(frame)

    def outwards(self) -> Iterator[_Call]:
        call: _Call | None = self
        while call is not None:
            yield call
            call = call.parent


class _Calls:
    """The calls of all threads, with what encloses them."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self._threads: dict[Any, list[_Call]] = defaultdict(list)
        self._launches: dict[Any, _Call] = {}
        flows: dict[str, dict[Any, tuple[Any, float]]] = {"s": {}, "f": {}}
        for event in events:
            kind, phase = event.get("cat"), event.get("ph")
            if phase == "X" and kind in _CALLS:
                start, arguments = float(event["ts"]), event.get("args", {})
                end, thread = start + float(event["dur"]), event["tid"]
                call = _Call(event["name"], start, end, thread, kind == "cpu_op", arguments)
                self._threads[thread].append(call)
                if kind in ("cuda_runtime", "cuda_driver") and "correlation" in arguments:
                    self._launches[arguments["correlation"]] = call
            elif kind == "fwdbwd" and phase in flows:
                flows[phase][event["id"]] = event["tid"], float(event["ts"])
        for calls in self._threads.values():
            calls.sort(key=lambda call: (call.start, -call.end))
            _nest(calls)
        self._link(flows)
        self._contexts: dict[_Call, tuple[str, ...]] = {}

    def all(self) -> Iterator[_Call]:
        for calls in self._threads.values():
            yield from calls

    def _link(self, flows: Mapping[str, Mapping[Any, tuple[Any, float]]]) -> None:
        """Give the calls of the backward pass the forward calls that they belong to."""
        begun = {(call.thread, call.start): call for call in self.all() if call.is_operator}
        for number, end in flows["f"].items():
            backward, forward = begun.get(end), begun.get(flows["s"].get(number, (None, 0.0)))
            if backward is not None and forward is not None and forward.start < backward.start:
                backward.forward = forward

    def context(self, call: _Call | None) -> tuple[str, ...]:
        """Names of the calls around, from `call` outwards."""
        if call is None:
            return ()
        if call not in self._contexts:
            of_forward = self.context(call.forward)
            self._contexts[call] = (call.name, *of_forward, *self.context(call.parent))
        return self._contexts[call]

    def gpu_activities(self, events: Iterable[Mapping[str, Any]]) -> Iterator[Activity]:
        """Yield the activities of a GPU. An operator's figures are of its longest kernel."""
        by_operator: dict[_Call | None, list[tuple[Mapping[str, Any], _Call | None]]] = defaultdict(list)
        for event in events:
            launch = self._launches.get(event.get("args", {}).get("correlation"))
            operator = next((call for call in launch.outwards() if call.is_operator), None) if launch else None
            by_operator[operator].append((event, launch))
        for operator, launched in by_operator.items():
            longest = max((event for event, _ in launched), key=lambda event: float(event["dur"]))
            for event, launch in launched:
                start, flops, moved = float(event["ts"]), None, _copied_bytes(event)
                if operator is not None and event is longest:
                    flops = product_flops(operator.name, operator.arguments)
                    moved = moved_bytes(operator.name, operator.arguments) if moved is None else moved
                pieces = ((start, start + float(event["dur"])),)
                yield Activity(event["name"], pieces, self.context(launch), flops, moved)

    def host_activities(self) -> Iterator[Activity]:
        """Yield the ranges of the host that a device may wait for."""
        for call in self.all():
            if call.name in ON_HOST:
                yield Activity(call.name, ((call.start, call.end),), on_host=True)

    def cpu_activities(self, window: _Call) -> Iterator[Activity]:
        """Yield the activities of a CPU. The context of a collective, on a thread of its own, is the main thread's."""
        main = self._threads[window.thread]
        starts = [call.start for call in main]
        for call in self.all():
            if call.name.startswith("gloo:"):
                before = bisect.bisect_right(starts, call.start)
                around = main[before - 1].outwards() if before else iter(())
                context = self.context(next((one for one in around if one.end > call.start), None))
                yield Activity(call.name, ((call.start, call.end),), context)
            elif call.computes and not any(one.name.startswith("gloo:") for one in call.outwards()):
                pieces = tuple(without((call.start, call.end), call.children))
                flops, moved = (of(call.name, call.arguments) for of in (product_flops, moved_bytes))
                yield Activity(call.name, pieces, self.context(call), flops, moved)


def _copied_bytes(event: Mapping[str, Any]) -> float | None:
    """Return the bytes that a copy or a memset moves in the GPU's memory; None for a kernel."""
    size = event.get("args", {}).get("bytes")
    within = event["name"].startswith("Memcpy DtoD")  # reads there, and writes
    return None if size is None else float(size) * (2 if within else 1)


def _nest(calls: Iterable[_Call]) -> None:
    """Find what encloses each of a thread's calls, which are sorted by their start."""
    around: list[_Call] = []
    for call in calls:
        while around and around[-1].end <= call.start:
            around.pop()
        if around:
            call.parent = around[-1]
            call.end = min(call.end, call.parent.end)  # ends are rounded
            call.parent.children.append((call.start, call.end))
        around.append(call)

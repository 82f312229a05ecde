"""Step time, its parts and the memory of each step, from a trace alone.

Knows the chrome trace of PyTorch's profiler and the ranges of `run`; does not know curves.
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dash_kernels.ranges import PREFIX
from tools.benchmarks.telemetry.run import MEASURED, STEP

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_GIB = 1 << 30
_CUDA = 1  # of PyTorch's device types


@dataclass
class StepSpans:
    """One step of a trace.

    Attributes:
        seconds: from the step's beginning to the end of its last kernel.
        parts: part -> seconds, and "rest" for the others.
        memory: name -> GiB, the peak since the end of the step before; empty without a GPU.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


def steps_of(path: Path) -> list[StepSpans]:
    """Return the steps of a compressed or plain trace in their order, without the first.

    Raises OSError if the file cannot be read.
    """
    content = path.read_bytes()
    parsed = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    return steps_of_events(parsed["traceEvents"])


def steps_of_events(events: Sequence[Mapping[str, Any]]) -> list[StepSpans]:
    """As `steps_of`, of the events of a trace."""
    ranges: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX):
            ranges[event["name"].removeprefix(PREFIX)].append((float(event["ts"]), float(event["ts"] + event["dur"])))
    device, memory = _Device(events), _memory(events)
    steps = sorted(ranges[STEP])
    ends = [next(stop for start, stop in sorted(ranges[MEASURED + "train"]) if start >= begin) for begin, _ in steps]
    found = []
    for (begin, _), before, end in zip(steps[1:], ends, ends[1:], strict=False):
        step = StepSpans(seconds=(device.moment(end) - begin) * 1e-6)
        for name, spans in ranges.items():
            inside = [(start, stop) for start, stop in spans if begin <= start < end]
            part = name.removeprefix(MEASURED)
            if part == name or part in ("train", "save") or not inside:
                continue
            # Data is read by the host, whatever the device does meanwhile.
            moment = float if part == "data" else device.moment
            step.parts[part] = sum(moment(stop) - moment(start) for start, stop in inside) * 1e-6
        step.parts["rest"] = step.seconds - sum(step.parts.values())
        step.memory = _peaks(memory, before, end)
        found.append(step)
    return found


class _Device:
    """The stream with most of the work, as far as it is known from its kernels; on a CPU there is none."""

    def __init__(self, events: Sequence[Mapping[str, Any]]) -> None:
        launched = {
            event["args"]["correlation"]: float(event["ts"])
            for event in events
            if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
        }
        work = [event for event in events if event.get("cat") in _ON_GPU]
        length: Counter[Any] = Counter()
        for event in work:
            length[event["args"]["stream"]] += event["dur"]
        stream = length.most_common(1)[0][0] if length else None
        of_stream = sorted(
            (launched[event["args"]["correlation"]], float(event["ts"] + event["dur"]))
            for event in work
            if event["args"]["stream"] == stream and event["args"]["correlation"] in launched
        )
        self._launches = [launch for launch, _ in of_stream]
        self._reached = list(itertools.accumulate((end for _, end in of_stream), max))

    def moment(self, time: float) -> float:
        """Return the time at which the stream has done what was launched before `time`: that of an event there."""
        before = bisect.bisect_left(self._launches, time)
        return max(time, self._reached[before - 1]) if before else time


def _memory(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """Return (time, name -> GiB) of every change of the GPU's memory."""
    names = {"allocated_peak_gib": "Total Allocated", "reserved_peak_gib": "Total Reserved"}
    found = [
        (float(event["ts"]), {name: event["args"][key] / _GIB for name, key in names.items()})
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == _CUDA
    ]
    return sorted(found, key=lambda change: change[0])


def _peaks(changes: Sequence[tuple[float, dict[str, float]]], start: float, end: float) -> dict[str, float]:
    """Return the peaks between two times, the level at the start included."""
    first = bisect.bisect_right(changes, start, key=lambda change: change[0])
    levels = [level for _, level in _until(changes[max(0, first - 1) :], end)]
    return {name: max(level[name] for level in levels) for name in levels[0]} if levels else {}


def _until(changes: Sequence[tuple[float, dict[str, float]]], end: float) -> Iterator[tuple[float, dict[str, float]]]:
    return itertools.takewhile(lambda change: change[0] <= end, changes)

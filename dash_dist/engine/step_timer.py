"""Where the time of a step goes: spans of the device's work, recorded in the steps that somebody asks about.

Knows events and names of spans; does not know what is computed in them. On a GPU a span is two events of the stream, so
that recording neither waits nor makes the host wait; on a CPU it is the host's clock.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from dash_kernels.ranges import named_range

# What Megatron-core's schedules call the spans they offer, and what they are here; the others are left out.
_OF_MEGATRON = {"forward-compute": "forward", "backward-compute": "backward"}


class StepTimer:
    """Adds up the spans of one step by name. Spans of one name follow each other; of different names they may nest.

    An instance is also what Megatron-core takes as `config.timers`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: dict[str, Any] = {}
        self.recording = False

    def begin(self, *, record: bool) -> None:
        """Forget the last step; record the next one, or do nothing in it."""
        self._spans.clear()
        self._open.clear()
        self.recording = record

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the block as a span, and as a range of a profiler that runs."""
        self.start(name)
        with named_range(name):
            yield
        self.stop(name)

    def start(self, name: str) -> None:
        if self.recording:
            self._open[name] = self._moment()

    def stop(self, name: str) -> None:
        if self.recording:
            self._spans[name].append((self._open.pop(name), self._moment()))

    def seconds(self) -> dict[str, float]:
        """Seconds by name, of the spans since `begin`. Waits for the device.

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self.recording:
            raise RuntimeError("no time was recorded: set record_seconds = True before the step you want it of")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return {
                name: sum(start.elapsed_time(stop) for start, stop in spans) / 1e3
                for name, spans in self._spans.items()
            }
        return {name: sum(stop - start for start, stop in spans) for name, spans in self._spans.items()}

    def __call__(self, name: str, log_level: int = 0) -> _MegatronSpan:
        return _MegatronSpan(self, _OF_MEGATRON.get(name))

    def _moment(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _MegatronSpan:
    """One of the timers that Megatron-core asks for by name."""

    def __init__(self, timer: StepTimer, name: str | None) -> None:
        self._timer = timer
        self._name = name

    def start(self, barrier: bool = False) -> None:
        """Without the barrier, whatever is asked: what is measured must not change what happens."""
        if self._name is not None:
            self._timer.start(self._name)

    def stop(self, barrier: bool = False) -> None:
        if self._name is not None:
            self._timer.stop(self._name)

"""Time and peak memory of a function on the current CUDA device. Knows nothing of attention."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MIN_REPEATS, MAX_REPEATS = 3, 20
SECONDS_PER_COLUMN = 1.5
ERROR_LENGTH = 300

Function = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Cell:
    """One measured column of a row: either times in milliseconds and bytes, or what went wrong.

    peak_bytes is the most memory allocated during a call beyond what was allocated before it (the inputs and the
    output's gradient) and what the call returned (the output, the inputs' gradients).
    host_ms is the time until one call on an idle device returns: below median_ms the device never waits for Python.
    """

    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None
    host_ms: float | None = None
    error: str | None = None

    @classmethod
    def of(cls, times: Sequence[float], peak_bytes: int | None = None, host_ms: float | None = None) -> Cell:
        """From the milliseconds of every repeat."""
        return cls(statistics.median(times), min(times), max(times), len(times), peak_bytes, host_ms)


def measure(function: Function) -> Cell:
    """Median over calls that follow each other on the stream, by CUDA events; compilation and warm-up excluded.

    Whatever the function raises becomes the cell's error: a column that fails must not take the others with it.
    """
    try:
        return _measure(function)
    except Exception as error:
        text = describe(error)
    # Only here, where the traceback is gone, are the tensors of the failed call free.
    gc.collect()
    with contextlib.suppress(RuntimeError):  # a device in error refuses this as well
        torch.cuda.empty_cache()
    return Cell(error=text)


def _measure(function: Function) -> Cell:
    function()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    results = function()
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() - held - storage_bytes(results)
    del results

    repeats = min(MAX_REPEATS, max(MIN_REPEATS, int(SECONDS_PER_COLUMN / seconds)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    return Cell.of(times, peak, 1000 * host)


def storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Memory that tensors keep, those that share it counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def kernel_times(function: Function) -> dict[str, float]:
    """Milliseconds on the device of every kernel of one call, by name, longest first; of a call after a warm one."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    on_device = [entry for entry in profile.key_averages() if entry.device_type == torch.autograd.DeviceType.CUDA]
    times = {entry.key: entry.self_device_time_total / 1000 for entry in on_device}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def describe(error: BaseException) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:ERROR_LENGTH]

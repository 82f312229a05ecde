"""Times of a call that all ranks make together, on GPUs by CUDA events. Knows nothing of attention."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from tools.benchmarks.context_parallel.ranks import Ranks
from tools.benchmarks.kernels.measure import Cell, describe, storage_bytes

MAX_REPEATS = 20
LONG_FIRST_CALL = 10.0  # seconds; what such a call spends on compiling is not worth a second one

T = TypeVar("T")
Mark = Callable[[], None]
# A call to time. It calls the mark it is given where its forward pass ends, and returns what its caller would keep.
Step = Callable[[Mark], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class StepTime:
    """Forward + backward and its forward part, the slowest rank's in each repeat; peak bytes by rank, beyond what was
    allocated before the call and what it returned. Empty where the call failed: `step.error` says why.
    """

    step: Cell
    forward: Cell = field(default_factory=Cell)
    peak_bytes: list[int] = field(default_factory=list)


class Clock:
    """Moments on the current stream of a device; on the CPU, of the host."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        if not self._cuda:
            self._moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments.append(event)

    def milliseconds(self) -> list[float]:
        """From the first mark to each later one, when all of them are past."""
        if self._cuda:
            torch.cuda.synchronize()
        first, *later = self._moments
        return [_between(first, moment) for moment in later]


def _between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end)
    assert isinstance(start, float)
    assert isinstance(end, float)  # one device's moments are of one kind
    return (end - start) * 1000


def time_once(step: Step, ranks: Ranks) -> tuple[float, float]:
    """(forward, all) milliseconds of one call on this rank, all ranks starting together."""
    clock = Clock(ranks.device)
    ranks.align()
    clock.mark()
    step(clock.mark)
    clock.mark()
    forward, whole = clock.milliseconds()
    return forward, whole


def measure_step(step: Step, ranks: Ranks, seconds: float, *, warm_up: Step | None = None) -> StepTime:
    """Medians over about `seconds` of calls, or the one time of a longer call. All ranks call this together, and each
    gets the same result.

    warm_up: a cheaper call that compiles the same kernels, after which every call counts. None: the first call is the
    warm-up, unless it takes LONG_FIRST_CALL. An error that every rank meets becomes the result's, and the ranks go on;
    one that a single rank meets while the others wait for it in a collective ends the run at its time limit.
    """
    try:
        if warm_up is not None:
            together(functools.partial(_discard, warm_up), ranks)
        first = together(lambda: _with_peak(step, ranks), ranks)
        peaks = [peak for peak, _ in first]
        rounds = [[times for _, times in first]]
        slowest = max(whole for _, whole in rounds[0]) / 1000
        if warm_up is None and slowest < LONG_FIRST_CALL:
            rounds.clear()
        repeats = max(min(MAX_REPEATS, int(seconds / slowest)), 1)
        while len(rounds) < repeats:
            rounds.append(together(lambda: time_once(step, ranks), ranks))
    except StepFailedError as error:
        return StepTime(Cell(error=str(error)))
    forward, whole = ([max(times[place] for times in by_rank) for by_rank in rounds] for place in (0, 1))
    return StepTime(Cell.of(whole, max(peaks)), Cell.of(forward), peaks)


class StepFailedError(Exception):
    """A call failed at some rank; raised at every rank, with the first failure's text."""


def together(function: Callable[[], T], ranks: Ranks) -> list[T]:
    """Every rank's function(), in rank order, at every rank; something small, since it travels between processes.

    Raises StepFailedError at all of them where one raised.
    """
    try:
        outcome: tuple[T | None, str | None] = function(), None
    except Exception as error:
        outcome = None, describe(error)
    outcomes = ranks.gather(outcome)
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]
    if failures:
        gc.collect()  # only here, where the traceback is gone, are the tensors of the failed call free
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        raise StepFailedError(failures[0])
    return [result for result, _ in outcomes]


def _discard(step: Step) -> None:
    step(no_mark)


def _with_peak(step: Step, ranks: Ranks) -> tuple[int, tuple[float, float]]:
    if ranks.device.type != "cuda":
        return 0, time_once(step, ranks)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    kept = 0

    def counted(mark: Mark) -> Sequence[torch.Tensor]:
        nonlocal kept
        results = step(mark)
        kept = storage_bytes(results)
        return results

    times = time_once(counted, ranks)
    return torch.cuda.max_memory_allocated() - held - kept, times


def no_mark() -> None:
    """For a call whose times are not taken."""

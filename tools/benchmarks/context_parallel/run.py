"""The parts of the benchmark, measured by all ranks together; rank 0 reports and writes."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from dash_dist.context_parallel.layout import LAYOUTS
from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.common.inputs import Case
from tools.benchmarks.context_parallel.calls import SPARSEST, Problem
from tools.benchmarks.context_parallel.dense_ring import DenseRing, find_dense_ring
from tools.benchmarks.context_parallel.overlap import FLIGHTS, Recording, alternate
from tools.benchmarks.context_parallel.ranks import Ranks
from tools.benchmarks.context_parallel.results import ExchangeRow, OverlapRow, Results, WeakRow
from tools.benchmarks.context_parallel.tables import tables
from tools.benchmarks.context_parallel.timing import (
    Mark,
    Step,
    StepFailedError,
    StepTime,
    measure_step,
    time_once,
    together,
)
from tools.benchmarks.kernels.measure import Cell, describe

PARTS = ("exchanges", "overlap", "weak", "layouts")
# Relative; of the selected triples of one GPU against those of each of all GPUs.
SAME_WORK = 0.005
LINK_BYTES = {"cuda": 2**30, "cpu": 2**20}  # that every rank sends
OVERLAP_SECONDS = 20.0  # of rounds, if that many are asked for


@dataclass(frozen=True)
class Request:
    """Request of the command line.

    detailed: the exchange of the parts overlap, weak and layouts. layout: of all parts but layouts.
    seconds: of repeated calls for one median.
    arguments: the command line; commit: what the results call this tree, None for git's HEAD.
    """

    cases: Sequence[Case]
    parts: Sequence[str]
    exchanges: Sequence[str]
    detailed: str
    layout: str
    dense: Sequence[str]
    dense_max_seq_len: int
    seconds: float
    overlap_rounds: int
    arguments: list[str]
    commit: str | None
    out: Path | None


def run(ranks: Ranks, request: Request) -> None:
    """Every part on every case; called at every rank."""
    benchmark = _Benchmark(ranks, request)
    benchmark.measure_link()
    for case in request.cases:
        benchmark.measure_case(case)
    benchmark.report(f"\n{tables(benchmark.results)}")


class _Benchmark:
    def __init__(self, ranks: Ranks, request: Request) -> None:
        self._ranks, self._request = ranks, request
        self._started = time.monotonic()
        self._rings: dict[str, DenseRing | str] = {}  # or why there is none
        self._dense_times: dict[tuple[str, Case], tuple[StepTime, str]] = {}
        device = ranks.device.type
        environment = describe_environment(
            "tools.benchmarks.context_parallel", request.arguments, commit=request.commit, device=device
        )
        environment["ranks"] = ranks.size
        if device == "cuda":
            environment["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
            environment["nccl_settings"] = {
                name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "CUDA_DEVICE_MAX"))
            }
        self.results = Results(environment)
        self.report(", ".join(f"{name} {value}" for name, value in environment.items()))

    def report(self, text: str) -> None:
        if self._ranks.rank == 0:
            print(f"[{time.monotonic() - self._started:7.1f} s] {text}", flush=True)

    def _keep(self) -> None:
        """After every part of a row: a run that is stopped keeps what it has."""
        if self._ranks.rank == 0 and self._request.out is not None:
            self.results.write(self._request.out)

    def measure_link(self) -> None:
        """All ranks send to all others at once, as the exchanges do."""
        ranks = self._ranks
        rows = LINK_BYTES[ranks.device.type] // (ranks.size - 1)
        outgoing, incoming = (torch.zeros(rows * ranks.size, dtype=torch.uint8, device=ranks.device) for _ in range(2))

        def step(after_forward: Mark) -> Sequence[torch.Tensor]:
            dist.all_to_all_single(incoming, outgoing, group=ranks.group)
            after_forward()
            return ()

        measured = measure_step(step, ranks, min(self._request.seconds, 1.0)).step
        if measured.median_ms is None:
            self.report(f"links: {measured.error}")
            return
        sent = rows * (ranks.size - 1)
        self.results.link = {
            "bytes": sent,
            "milliseconds": measured.median_ms,
            "gigabytes_per_second": sent / measured.median_ms / 1e6,
        }
        self.report(f"links: {self.results.link['gigabytes_per_second']:.1f} GB/s per rank")
        self._keep()

    def measure_case(self, case: Case) -> None:
        row = ExchangeRow(case, self._ranks.size, self._request.layout)
        if "exchanges" in self._request.parts:
            self.results.exchanges.append(row)
        with self._recorded(row, "all ranks"):
            self._together(row)
        # Only here are the tensors of the whole problem gone, which makes room for the next one's.
        if "weak" in self._request.parts and self._request.detailed in row.columns:
            for sequences in (1, self._ranks.size):
                with self._recorded(row, f"weak scaling against {sequences} x T / {self._ranks.size}"):
                    self._weak(row, sequences)
        if "layouts" in self._request.parts and self._request.detailed in row.columns:
            with self._recorded(row, "layouts"):
                self._layouts(row)

    @contextlib.contextmanager
    def _recorded(self, row: ExchangeRow, what: str) -> Iterator[None]:
        """Record a failure that all ranks share in the results, and continue the benchmark."""
        try:
            yield
        except (ValueError, torch.OutOfMemoryError, StepFailedError) as error:
            self.results.errors[f"{row.label}: {what}"] = describe(error)
            self.report(f"{row.label}: {what}: {describe(error)}")
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self._keep()

    def _together(self, row: ExchangeRow) -> None:
        parts = self._request.parts
        problem = Problem(row.case, self._ranks, layout=row.layout)
        row.routing_scale = problem.find_routing_scale()
        row.selected = problem.selected(row.routing_scale)
        self.report(f"{row.label}: routing_scale {row.routing_scale:.4g}, density {row.density:.4f}")
        if "exchanges" in parts:
            for exchange in self._request.exchanges:
                self._exchange(row, problem, exchange)
            for name in self._request.dense:
                self._dense(row, problem, name)
        if "weak" in parts or "layouts" in parts:
            self._exchange(row, problem, self._request.detailed)
        if "exchanges" in parts or "weak" in parts:
            row.routing = self._routing(problem, row.routing_scale)
        if "exchanges" in parts:
            row.coverage = problem.coverage(row.routing_scale)
        self._keep()
        if "overlap" in parts:
            self._overlap(problem, row.routing_scale)

    def _exchange(self, row: ExchangeRow, problem: Problem, exchange: str) -> None:
        if exchange in row.columns:
            return
        assert row.routing_scale is not None  # found before anything is measured
        step, warm_up = (problem.step(scale, exchange) for scale in (row.routing_scale, SPARSEST))
        row.columns[exchange] = measure_step(step, self._ranks, self._request.seconds, warm_up=warm_up)
        if row.columns[exchange].step.error is None:
            row.counters[exchange] = problem.counters()
        self._report_column(row, exchange)

    def _dense(self, row: ExchangeRow, problem: Problem, name: str) -> None:
        if row.case.seq_len > self._request.dense_max_seq_len:
            row.errors[name] = f"not run: longer than --dense-max-seq-len {self._request.dense_max_seq_len}"
            return
        row.dense.append(name)
        tensors = replace(row.case, asked_density=1.0)  # cases of other densities have the same, and dense time
        if (name, tensors) not in self._dense_times:
            self._dense_times[name, tensors] = self._measure_dense(row.case, problem, name)
        row.columns[name], row.about[name] = self._dense_times[name, tensors]
        self._report_column(row, name)

    def _measure_dense(self, case: Case, problem: Problem, name: str) -> tuple[StepTime, str]:
        if name not in self._rings:
            self._rings[name] = self._find_ring(name, case)
        ring = self._rings[name]
        if isinstance(ring, str):
            return StepTime(Cell(error=f"not run: {ring}")), "not run"
        with ring.ring(self._ranks):
            return measure_step(ring.step(case, problem.inputs), self._ranks, self._request.seconds), ring.description

    def _find_ring(self, name: str, case: Case) -> DenseRing | str:
        try:
            return find_dense_ring(name, case, self._ranks)
        except StepFailedError as error:
            return str(error)

    def _routing(self, problem: Problem, routing_scale: float) -> Cell:
        return measure_step(problem.routing_step(routing_scale), self._ranks, min(self._request.seconds, 1.0)).step

    def _overlap(self, problem: Problem, routing_scale: float) -> None:
        exchange = self._request.detailed
        row = OverlapRow(problem.case, self._ranks.size, exchange)
        self.results.overlap.append(row)
        if exchange not in FLIGHTS:
            row.error = f"exchange {exchange!r} starts no flights that are known here: {', '.join(FLIGHTS)} do"
        else:
            step, recording = problem.step(routing_scale, exchange), Recording(FLIGHTS[exchange])
            try:
                self._slowest(problem.step(SPARSEST, exchange))  # compiles
                seconds = self._slowest(recording.record(step)) / 1000
                rounds = max(min(self._request.overlap_rounds, int(OVERLAP_SECONDS / 2 / seconds)), 1)
                counted: list[float] = []

                def both() -> float:
                    milliseconds = self._slowest(step)
                    counted.append(problem.counters().overlap or 0.0)
                    return milliseconds

                communicate, compute = recording.communicate(), recording.compute(step)
                row.times = alternate(both, lambda: self._slowest(communicate), lambda: self._slowest(compute), rounds)
                row.counted = statistics.median(counted)
            except StepFailedError as error:
                row.error = str(error)
        self.report(f"{problem.case.seq_len} {exchange}: overlap {row.error or row.times.overlap}")
        self._keep()

    def _slowest(self, step: Step) -> float:
        """Milliseconds of one call, at the slowest rank."""
        return max(whole for _, whole in together(lambda: time_once(step, self._ranks), self._ranks))

    def _weak(self, row: ExchangeRow, sequences: int) -> None:
        ranks, exchange = self._ranks, self._request.detailed
        alone_case = replace(row.case, seq_len=row.case.seq_len // ranks.size)
        per_sequence = sum(row.selected) / ranks.size / sequences
        alone_case = replace(alone_case, asked_density=per_sequence / alone_case.available)
        if alone_case.asked_density > 1:
            raise ValueError(f"one GPU would have to select {alone_case.asked_density:.2f} of its chunks")
        problem = Problem(alone_case, ranks, alone=True, sequences=sequences)
        scale = problem.find_routing_scale(aim=SAME_WORK)
        step, warm_up = (problem.step(routing_scale, exchange) for routing_scale in (scale, SPARSEST))
        weak = WeakRow(
            row.case,
            alone_case,
            ranks.size,
            exchange,
            row.columns[exchange],
            measure_step(step, ranks, self._request.seconds, warm_up=warm_up),
            row.routing,
            self._routing(problem, scale),
            (max(row.selected), problem.selected(scale)[0]),
            sequences,
        )
        self.results.weak.append(weak)
        efficiencies = f"{weak.efficiency}, without stages 1 and 2 {weak.efficiency_without_routing}"
        self.report(f"{row.label}: weak scaling against {sequences} x {alone_case.seq_len}: {efficiencies}")

    def _layouts(self, measured: ExchangeRow) -> None:
        exchange = self._request.detailed
        for layout in LAYOUTS:
            row = replace(
                measured,
                layout=layout,
                columns={},
                counters={},
                coverage={},
                about={},
                dense=[],
                errors={},
                routing=Cell(),
            )
            self.results.layouts.append(row)
            if layout == measured.layout:
                row.columns[exchange] = measured.columns[exchange]
                row.counters = {exchange: measured.counters[exchange]} if exchange in measured.counters else {}
                continue
            problem = Problem(row.case, self._ranks, layout=layout)
            assert row.routing_scale is not None  # the layouts cut the same sequence
            row.selected = problem.selected(row.routing_scale)
            self._exchange(row, problem, exchange)

    def _report_column(self, row: ExchangeRow, name: str) -> None:
        step = row.columns[name].step
        self.report(f"{row.label}: {name}: {step.error or f'{step.median_ms:.2f} ms, {step.repeats} calls'}")
        self._keep()

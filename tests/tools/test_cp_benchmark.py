"""The context-parallel benchmark on the CPU: the whole command on two ranks, and its parts by themselves."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dash_dist import shard_positions
from dash_dist.context_parallel.layout import LAYOUTS
from tests.support.ranks import run_ranks as run_test_ranks
from tests.tools.cp_cases import CASE
from tools.benchmarks.context_parallel import timing
from tools.benchmarks.context_parallel.__main__ import main, parse
from tools.benchmarks.context_parallel.calls import Problem
from tools.benchmarks.context_parallel.inputs import shard_inputs
from tools.benchmarks.context_parallel.overlap import FLIGHTS, OverlapTimes, Recording, Site, alternate, overlap
from tools.benchmarks.context_parallel.ranks import Ranks, RanksFailedError, run_ranks
from tools.benchmarks.context_parallel.results import Results
from tools.benchmarks.context_parallel.tables import tables
from tools.benchmarks.context_parallel.timing import Mark, StepTime, measure_step, no_mark
from tools.benchmarks.kernels.measure import Cell

CPU = torch.device("cpu")
AS_OPTIONS = "--device cpu --seq-len 256 --heads 4,2 --head-dim 16 --chunk-size 16 --dtype fp32 --density 0.5"


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "results.json", tmp_path / "results.png"
    some = "--exchange auto selective ring --dense dense-cudnn --seconds 0.1 --overlap-rounds 2"
    main([*AS_OPTIONS.split(), *some.split(), "--time-limit", "200", "--out", str(out), "--plot", str(picture)])
    printed = capfd.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")

    results = Results.read(out)
    (row,) = results.exchanges
    assert row.case == CASE
    assert row.density == pytest.approx(0.5, rel=0.1)
    assert list(row.columns) == ["auto", "selective", "ring", "dense-cudnn"]
    for name in ("auto", "selective", "ring"):
        step, forward = (row.columns[name].step.median_ms, row.columns[name].forward.median_ms)
        assert step is not None
        assert forward is not None
        assert 0 < forward < step
    assert row.routing.repeats >= 1
    selective, ring = row.counters["selective"], row.counters["ring"]
    assert 0 < selective.sent_bytes == selective.planned_bytes <= selective.dense_bytes
    assert selective.coverage is not None
    assert 0 < selective.coverage <= 1
    assert ring.coverage is None
    assert sum(row.counters["auto"].exchanges.values()) == 1
    assert list(row.coverage) == ["64", "32"]  # a piece is 64 tokens
    assert all(0 < share <= 1 for share in row.coverage.values())
    # PyTorch's context parallelism has no ring over the CPU's kernels: a row that says so, and the rest goes on.
    assert (row.columns["dense-cudnn"].step.error or "").startswith("not run: PyTorch's context_parallel")
    assert row.fastest_dense is None
    assert tables(results) in printed

    assert [weak.sequences for weak in results.weak] == [1, 2]
    for weak in results.weak:
        assert weak.alone_case.seq_len == CASE.seq_len // 2
        assert weak.selected[1] == pytest.approx(sum(row.selected) / 2, rel=0.1)
        assert weak.efficiency is not None
    assert results.weak[1].alone_case.asked_density == pytest.approx(results.weak[0].alone_case.asked_density / 2)
    (overlapped,) = results.overlap
    assert overlapped.error is None
    assert [len(times) for times in vars(overlapped.times).values()] == [2, 2, 2]
    assert {layout.layout: sum(layout.selected) for layout in results.layouts} == {
        layout: sum(row.selected)  # the same sequence, cut differently
        for layout in LAYOUTS
    }
    imbalance = {layout.layout: layout.imbalance or 0 for layout in results.layouts}
    assert 1 <= imbalance["double_zigzag"] < imbalance["contiguous"] < 2
    assert 1 <= imbalance["zigzag"] < imbalance["contiguous"]
    assert results.link["gigabytes_per_second"] > 0
    assert results.environment["ranks"] == 2

    main(["--predict", str(out), "--predict-ranks", "8", "16", "--predict-seq-len", "4096"])
    predicted = capfd.readouterr().out
    assert "| 16 | 4096 |" in predicted
    assert "Assumed:" in predicted


def replay() -> None:
    """At each of two ranks."""
    assert dist.group.WORLD is not None
    problem = Problem(CASE, Ranks(dist.get_rank(), 2, CPU, dist.group.WORLD, dist.group.WORLD))
    for exchange in FLIGHTS:
        step, recording = problem.step(2.0, exchange), Recording(FLIGHTS[exchange])
        recorded = [x.clone() for x in recording.record(step)(no_mark)]
        sent = problem.counters().sent_bytes
        assert sent > 0
        again = recording.compute(step)(no_mark)
        assert problem.counters().sent_bytes == 0
        assert all(map(torch.equal, recorded, again))
        assert recording.communicate()(no_mark) == ()


@pytest.mark.slow
def test_an_exchange_computes_the_same_with_flights_that_have_landed() -> None:
    run_test_ranks("tests.tools.test_cp_benchmark:replay", 2, cpu_only=True)


def _dies(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(3)
    ranks.align()


def _hangs(ranks: Ranks) -> None:
    time.sleep(1000)


@pytest.mark.slow
def test_a_dead_rank_and_one_that_hangs_end_the_run() -> None:
    with pytest.raises(RanksFailedError):
        run_ranks(_dies, 2, "cpu", 100)
    started = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"took more than 1 s: raise --time-limit"):
        run_ranks(_hangs, 2, "cpu", 1)
    assert time.monotonic() - started < 60


def test_layouts_cut_the_same_sequence() -> None:
    joined = {}
    for layout in LAYOUTS:
        shards = [shard_inputs(CASE, rank, 2, layout, CPU) for rank in range(2)]
        positions = torch.cat([shard_positions(CASE.seq_len, rank, 2, layout) for rank in range(2)]).argsort()
        assert torch.equal(shards[0].summary_query, shards[1].summary_query)
        joined[layout] = [
            torch.cat([vars(shard)[name] for shard in shards], 1)[:, positions] for name in ("q", "k", "v", "grad")
        ]
    for zigzag, *others in zip(*joined.values(), strict=True):
        assert all(torch.equal(zigzag, other) for other in others)
        pieces = zigzag.unflatten(1, (8, -1))
        assert not any(torch.equal(pieces[:, 0], pieces[:, other]) for other in range(1, 8))


def test_overlap_is_what_is_saved_of_the_shorter_time() -> None:
    assert overlap(both=10.0, communication=2.0, compute=10.0) == 1
    assert overlap(both=12.0, communication=2.0, compute=10.0) == 0
    assert overlap(both=10.5, communication=2.0, compute=10.0) == 0.75
    assert overlap(both=6.0, communication=5.0, compute=4.0) == 0.75  # computation is the shorter
    calls: list[str] = []

    def taking(name: str, *milliseconds: float) -> Any:
        left = list(milliseconds)
        return lambda: (calls.append(name), left.pop(0))[1]

    times = alternate(taking("A", 10, 30, 11), taking("B", 1, 3, 2, 2, 2, 2), taking("C", 10, 10, 10), rounds=3)
    assert "".join(calls) == "BABC" * 3
    assert times.overlap == 0.5
    assert times.spread == (-9, 1)
    assert OverlapTimes().overlap is None


class _Flight:
    def __init__(self, brings: torch.Tensor) -> None:
        self.brings, self.timing = brings, "timing"

    def wait(self) -> torch.Tensor:
        return self.brings


def test_a_recording_brings_what_came() -> None:
    exchange: Any = ModuleType("exchange")
    started: list[float] = []

    def fetch(value: float, *, doubled: bool = False) -> _Flight:
        started.append(value)
        return _Flight(torch.tensor([2 * value if doubled else value]))

    exchange.fetch = fetch

    def step(after_forward: Mark) -> Sequence[torch.Tensor]:
        fetched = exchange.fetch(3.0, doubled=True)
        assert fetched.timing == "timing"
        brought = fetched.wait()
        after_forward()
        return brought, exchange.fetch(5.0).wait()

    recording = Recording((Site(exchange, "fetch"),))
    assert [x.item() for x in recording.record(step)(no_mark)] == [6, 5]
    assert [x.item() for x in recording.compute(step)(no_mark)] == [6, 5]
    assert started == [3, 5]
    recording.communicate()(no_mark)
    assert started == [3, 5, 3, 5]
    assert exchange.fetch is fetch
    with pytest.raises(RuntimeError, match=r"no flight through exchange\.fetch"):
        recording.record(lambda after_forward: ())(no_mark)


def _slower(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_slower(entry) for entry in value)
    return value + 1 if isinstance(value, float) else value


class _OfTwo(Ranks):
    """This rank of two: the other says what this one says, and takes 1 ms longer for everything."""

    def __init__(self) -> None:
        group: Any = None
        super().__init__(0, 2, CPU, group, group)

    def gather(self, value: Any) -> list[Any]:
        return [value, _slower(value)]

    def align(self) -> None:
        """There is nobody to wait for."""


def test_a_time_is_the_slowest_ranks_and_long_calls_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = [30.0, 20.0, 40.0, 10.0]
    left: list[float] = []
    warmed: list[str] = []
    monkeypatch.setattr(timing, "time_once", lambda step, ranks: (1.0, left.pop(0)))

    def step(after_forward: Mark) -> Sequence[torch.Tensor]:
        return ()

    left[:] = takes
    measured = measure_step(step, _OfTwo(), 0.1, warm_up=lambda mark: warmed.append("up") or ())
    assert warmed == ["up"]
    assert measured.step == Cell(31.0, 21.0, 41.0, 3, 0)  # 100 ms are three times the first 31
    assert measured.forward.median_ms == 2.0
    left[:] = takes
    assert measure_step(step, _OfTwo(), 0.1).step.median_ms == 21.0  # the first is the warm-up
    left[:] = [5000.0]
    assert measure_step(step, _OfTwo(), 0.1, warm_up=step).step.repeats == 1
    left[:] = [20000.0]
    assert measure_step(step, _OfTwo(), 0.1).step.repeats == 1


def test_a_failing_call_is_a_cell_with_its_error() -> None:
    def step(after_forward: Mark) -> Sequence[torch.Tensor]:
        raise ValueError("no such exchange\nand more")

    assert measure_step(step, _OfTwo(), 0.1) == StepTime(Cell(error="rank 0: ValueError: no such exchange"))


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--seq-len", "300"], "multiple of 4 x ranks x chunk_size = 128"),
        (["--ranks", "1"], "give 2 or more"),
        (["--plot", str(tmp_path / "x.png")], "give --out as well"),
        (["--exchange", "carrier-pigeon"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            parse([*AS_OPTIONS.split(), *wrong])
        assert message in capsys.readouterr().err
    Results({}).write(tmp_path / "empty.json")
    with pytest.raises(SystemExit, match="run the benchmark"):
        main(["--predict", str(tmp_path / "empty.json")])

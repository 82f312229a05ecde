"""The context-parallel benchmark on the CPU: the whole command on two ranks, and its parts by themselves."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_cp
import pytest
import torch
import torch.distributed as dist
from cp_benchmark import timing
from cp_benchmark.calls import Problem
from cp_benchmark.inputs import shard_inputs
from cp_benchmark.overlap import FLIGHTS, OverlapTimes, Recording, Site, alternate, overlap
from cp_benchmark.predict import Constants, constants_of, predict
from cp_benchmark.ranks import Ranks, RanksFailedError, run_ranks
from cp_benchmark.results import Counters, ExchangeRow, OverlapRow, Results, WeakRow
from cp_benchmark.tables import tables
from cp_benchmark.timing import Mark, StepTime, measure_step, no_mark
from kernel_benchmark.inputs import Case
from kernel_benchmark.measure import Cell
from ranks import run_ranks as run_test_ranks

from dash_dist import shard_positions
from dash_dist.context_parallel.traffic import TrafficSummary

CPU = torch.device("cpu")
CASE = Case(
    seq_len=256,
    query_heads=4,
    kv_heads=2,
    head_dim=16,
    chunk_size=16,
    dtype="fp32",
    inputs="smooth",
    asked_density=0.5,
    prior_sigma=None,
)
AS_OPTIONS = "--device cpu --seq-len 256 --heads 4,2 --head-dim 16 --chunk-size 16 --dtype fp32 --density 0.5"


def test_the_whole_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "results.json", tmp_path / "results.png"
    some = "--exchange auto selective ring --dense dense-cudnn --seconds 0.1 --overlap-rounds 2"
    bench_cp.main(
        [*AS_OPTIONS.split(), *some.split(), "--time-limit", "200", "--out", str(out), "--plot", str(picture)]
    )
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

    (weak,) = results.weak
    assert weak.alone_case.seq_len == CASE.seq_len // 2
    assert weak.selected[1] == pytest.approx(sum(row.selected) / 2, rel=0.1)
    assert weak.efficiency is not None
    (overlapped,) = results.overlap
    assert overlapped.error is None
    assert [len(times) for times in vars(overlapped.times).values()] == [2, 2, 2]
    assert {layout.layout: sum(layout.selected) for layout in results.layouts} == {
        "zigzag": sum(row.selected),  # the same sequence, cut differently
        "contiguous": sum(row.selected),
    }
    zigzag, contiguous = (layout.imbalance or 0 for layout in results.layouts)
    assert 1 <= zigzag < contiguous < 2
    assert results.link["gigabytes_per_second"] > 0
    assert results.environment["ranks"] == 2

    bench_cp.main(["--predict", str(out), "--predict-ranks", "8", "16", "--predict-seq-len", "4096"])
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
        # What is added where it lands is not there: the gradients of k and v, of the selective exchange.
        compared = (0, 1, 4) if exchange == "selective" else range(5)
        assert all(torch.equal(recorded[place], again[place]) for place in compared)
        assert recording.communicate()(no_mark) == ()


def test_an_exchange_computes_the_same_with_flights_that_have_landed() -> None:
    run_test_ranks("test_cp_benchmark:replay", 2, cpu_only=True)


def _dies(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(3)
    ranks.align()


def _hangs(ranks: Ranks) -> None:
    time.sleep(1000)


def test_a_dead_rank_and_one_that_hangs_end_the_run() -> None:
    with pytest.raises(RanksFailedError):
        run_ranks(_dies, 2, "cpu", 100)
    started = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"took more than 1 s: raise --time-limit"):
        run_ranks(_hangs, 2, "cpu", 1)
    assert time.monotonic() - started < 60


def test_layouts_cut_the_same_sequence() -> None:
    joined = {}
    for layout in ("zigzag", "contiguous"):
        shards = [shard_inputs(CASE, rank, 2, layout, CPU) for rank in range(2)]
        positions = torch.cat([shard_positions(CASE.seq_len, rank, 2, layout) for rank in range(2)]).argsort()
        assert torch.equal(shards[0].summary_query, shards[1].summary_query)
        joined[layout] = [
            torch.cat([vars(shard)[name] for shard in shards], 1)[:, positions] for name in ("q", "k", "v", "grad")
        ]
    for zigzag, contiguous in zip(*joined.values(), strict=True):
        assert torch.equal(zigzag, contiguous)
        pieces = zigzag.unflatten(1, (4, -1))
        assert not any(torch.equal(pieces[:, 0], pieces[:, other]) for other in (1, 2, 3))


def test_overlap_is_what_is_saved_of_the_shorter_time() -> None:
    assert overlap(both=10.0, communication=2.0, compute=10.0) == 1
    assert overlap(both=12.0, communication=2.0, compute=10.0) == 0
    assert overlap(both=10.5, communication=2.0, compute=10.0) == 0.75
    assert overlap(both=6.0, communication=5.0, compute=4.0) == 0.75  # computation is the shorter
    calls: list[str] = []

    def taking(name: str, *milliseconds: float) -> Any:
        left = list(milliseconds)
        return lambda: (calls.append(name), left.pop(0))[1]

    times = alternate(taking("A", 10, 30, 11), taking("B", 2, 2, 2), taking("C", 10, 10, 10), rounds=3)
    assert "".join(calls) == "ABCABCABC"
    assert times.overlap == 0.5
    assert times.spread == (-9, 1)
    assert OverlapTimes().overlap is None


class _Flight:
    def __init__(self, brings: torch.Tensor) -> None:
        self.brings, self.timing = brings, "timing"

    def land(self, *own: torch.Tensor) -> torch.Tensor:
        return own[0].add_(self.brings) if own else self.brings


def test_a_recording_brings_what_came_and_leaves_alone_what_it_is_added_to() -> None:
    exchange: Any = ModuleType("exchange")
    started: list[float] = []

    def fetch(value: float, *, doubled: bool = False) -> _Flight:
        started.append(value)
        return _Flight(torch.tensor([2 * value if doubled else value]))

    exchange.fetch = fetch
    own = torch.tensor([1.0])

    def step(after_forward: Mark) -> Sequence[torch.Tensor]:
        fetched = exchange.fetch(3.0, doubled=True)
        assert fetched.timing == "timing"
        brought = fetched.land()
        after_forward()
        return brought, exchange.fetch(5.0).land(own)

    recording = Recording((Site(exchange, "fetch"),))
    assert [x.item() for x in recording.record(step)(no_mark)] == [6, 6]
    assert [x.item() for x in recording.compute(step)(no_mark)] == [6, 6]
    assert started == [3, 5]
    assert own.item() == 6
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


def step_time(whole: float, forward: float) -> StepTime:
    return StepTime(Cell.of([whole]), Cell.of([forward]), [2**30, 2**29])


def measured_row() -> ExchangeRow:
    """64 ms of which 4 are routing; 60 ms of stage 3 on two ranks, a third of them forward."""
    case = replace(CASE, seq_len=1024, dtype="bf16", asked_density=0.25)
    per_rank = case.available // 8
    return ExchangeRow(
        case,
        ranks=2,
        layout="zigzag",
        routing_scale=3.0,
        selected=[per_rank, per_rank],
        columns={
            "selective": step_time(64.0, 24.0),
            "ring": step_time(70.0, 30.0),
            "dense-flash": step_time(256.0, 9.0),
        },
        routing=Cell.of([4.0]),
        counters={"selective": Counters(1000, 1000, 4000, 0, 0.25, 0.9, {"selective": 1})},
        coverage={"64": 0.5, "256": 1.0},
        about={"dense-flash": "enable_gqa"},
        dense=["dense-flash"],
        errors={"dense-cudnn": "not run: too long"},
    )


def test_results_survive_their_file_and_are_derived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = measured_row()
    weak = WeakRow(
        row.case,
        replace(row.case, seq_len=512, asked_density=0.5),
        2,
        "selective",
        step_time(64.0, 24.0),
        step_time(60.0, 22.0),
        Cell.of([4.0]),
        Cell.of([2.0]),
        (100, 101),
    )
    results = Results(
        {"gpu": "none", "ranks": 2, "torch": "2", "triton": "3", "commit": "unknown"},
        {"bytes": 1e9, "milliseconds": 10.0, "gigabytes_per_second": 100.0},
        [row],
        [weak],
        [OverlapRow(row.case, 2, "selective", alternate(lambda: 61.0, lambda: 4.0, lambda: 60.0, 2), 0.7)],
        [replace(row, layout="contiguous", selected=[10, 30])],
        {"512: weak scaling": "OutOfMemoryError: too much"},
    )
    path = tmp_path / "results.json"
    results.write(path)
    assert Results.read(path) == results

    content = json.loads(path.read_text())
    derived = content["exchanges"][0]["derived"]
    assert derived["tokens_per_second"]["selective"] == 16000
    assert derived["speed_up_over_dense"] == {"selective": 4.0, "ring": pytest.approx(256 / 70)}
    assert content["weak"][0]["derived"] == {"efficiency": 60 / 64, "efficiency_without_routing": 58 / 60}
    assert content["overlap"][0]["derived"] == {"overlap": 0.75, "spread": [0.75, 0.75]}
    assert content["layouts"][0]["derived"]["imbalance"] == 1.5

    bench_cp.main(["--plot-only", str(path)])
    printed = capsys.readouterr().out
    assert "not run: too long" in printed
    assert "512: weak scaling: OutOfMemoryError: too much" in printed
    assert "16.0 (4.00)" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_counters_of_all_ranks() -> None:
    def of_rank(sent: int, needed: int, waited: float) -> TrafficSummary:
        return TrafficSummary(
            planned_bytes=10,
            sent_bytes=sent,
            slow_link_bytes=1,
            dense_bytes=40,
            needed_blocks=needed,
            reachable_blocks=4 * needed,
            flight_seconds=2.0 if needed else 0.0,
            waited_seconds=waited,
            work=torch.empty(0, dtype=torch.int64),
            exchanges={"selective": 1},
        )

    together = Counters.over_ranks([of_rank(9, 1, 0.5), of_rank(11, 3, 0.5)])
    assert together == Counters(20, 20, 80, 2, 0.25, 0.75, {"selective": 1})
    nothing = Counters.over_ranks([of_rank(0, 0, 0.0)])
    assert nothing.coverage is None
    assert nothing.overlap is None


def test_constants_come_from_the_fastest_exchange() -> None:
    row = measured_row()
    constants = constants_of(row, 100.0)
    assert constants.pair_ns == pytest.approx(60e6 / row.selected[0])
    assert constants.routing_ns == pytest.approx(4e6 / (4 * row.case.available / 2 / 2))
    assert constants.forward_share == pytest.approx(1 / 3)
    assert constants.coverage == ((64, 0.5), (256, 1.0))
    # The model gives back what was measured where it was measured.
    assert predict(constants, 2, 1024).compute == pytest.approx(64.0)
    row.routing = Cell()
    with pytest.raises(ValueError, match="nothing to predict from"):
        constants_of(row, 100.0)


def test_predictions_by_hand() -> None:
    case = replace(CASE, seq_len=2**20, kv_heads=8, query_heads=32, head_dim=128, chunk_size=64, dtype="bf16")
    constants = Constants(
        case,
        density=0.05,
        pair_ns=0.1,
        routing_ns=0.0,
        forward_share=0.25,
        imbalance=1.0,
        link=400.0,
        coverage=((1024, 0.5), (4096, 0.75), (16384, 1.0)),
    )
    assert [constants.coverage_of(tokens) for tokens in (8, 1024, 2048, 16384, 10**6)] == [0.5, 0.5, 0.625, 1.0, 1.0]
    prediction = predict(constants, 512, 2**20, network=50.0)
    compute = 0.1e-6 * 0.05 * 8 * 2**20 * (2**14 + 1) / 2 / 512
    assert prediction.compute == pytest.approx(compute)
    kv_bytes = 2 * 2**20 * 8 * 128 * 2
    summaries = 2 * (2**14 * 8 * 128 * 4) * 511 / 512

    def exposed(per_pass: float, link: float) -> float:
        hidden = compute / 512  # the own shard's part of forward and backward, both shorter than the flights
        return 4 * per_pass - hidden + summaries / link / 1e6

    travel = 0.5 * kv_bytes * 511 / 512
    assert prediction.exposed_fast == pytest.approx(exposed(travel / 400e6, 400))
    assert prediction.exposed_flat == pytest.approx(exposed(0.5 * kv_bytes * 504 / 512 / 50e6, 50))
    # 8 neighbouring ranks need the chunks of 8192 tokens together, and bring an eighth each.
    rail = 0.875 * kv_bytes * 504 / 512 / 8 / 50e6
    assert prediction.exposed_two_level == pytest.approx(exposed(rail + travel / 400e6, 50))
    assert prediction.efficiency(prediction.compute) == 0.5

    inside_a_node = predict(constants, 8, 2**24)
    assert inside_a_node.exposed_fast == inside_a_node.exposed_flat == inside_a_node.exposed_two_level
    assert replace(constants, coverage=()).coverage_of(200) == pytest.approx(1 - 0.95**2)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--seq-len", "300"], "multiple of 2 x ranks x chunk_size = 64"),
        (["--ranks", "1"], "give 2 or more"),
        (["--plot", str(tmp_path / "x.png")], "give --out as well"),
        (["--exchange", "carrier-pigeon"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            bench_cp.parse([*AS_OPTIONS.split(), *wrong])
        assert message in capsys.readouterr().err
    Results({}).write(tmp_path / "empty.json")
    with pytest.raises(SystemExit, match="run bench_cp"):
        bench_cp.main(["--predict", str(tmp_path / "empty.json")])

"""The context-parallel benchmark's results: their file, what is derived from them, tables, plot and predictions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dash_dist.context_parallel.exchange_counters import TrafficSummary
from tests.tools.cp_cases import CASE
from tools.benchmarks.context_parallel.__main__ import main
from tools.benchmarks.context_parallel.overlap import alternate
from tools.benchmarks.context_parallel.predict import Constants, constants_of, predict
from tools.benchmarks.context_parallel.results import Counters, ExchangeRow, OverlapRow, Results, WeakRow
from tools.benchmarks.context_parallel.timing import StepTime
from tools.benchmarks.kernels.measure import Cell


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

    main(["--plot-only", str(path)])
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
            transfer_seconds=2.0 if needed else 0.0,
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

"""The telemetry benchmark: spans from the kernels of a trace, differences from curves, and the cost of logging."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.support.runs import run_command
from tools.benchmarks.telemetry.compare import compare, cost_of_logging, kind_of
from tools.benchmarks.telemetry.run import INTERVAL
from tools.benchmarks.telemetry.spans import StepSpans, steps_of_events


def span(name: str, start: float, end: float) -> dict[str, object]:
    return {"cat": "user_annotation", "name": f"dash: {name}", "ts": start, "dur": end - start}


def kernel(number: int, launched: float, start: float, end: float, stream: int = 7) -> list[dict[str, object]]:
    arguments = {"correlation": number}
    return [
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": launched, "dur": 1, "args": arguments},
        {"cat": "kernel", "name": "k", "ts": start, "dur": end - start, "args": arguments | {"stream": stream}},
    ]


def memory(at: float, gib: float) -> dict[str, object]:
    arguments = {"Device Type": 1, "Total Allocated": gib * 2**30, "Total Reserved": 8 * 2**30}
    return {"ph": "i", "name": "[memory]", "ts": at, "args": arguments}


def test_a_part_ends_with_the_work_that_was_launched_in_it() -> None:
    """The host launches forward and optimizer in no time, and leaves while the optimizer's kernel runs."""
    events = [
        *(span("whole step", start, start + 1000) for start in (0, 1000)),
        *(span("measured train", start, start + 350) for start in (100, 1100)),
        span("measured data", 1000, 1050),
        span("measured forward", 1100, 1110),
        *kernel(1, 1105, 1120, 1400),
        span("measured optimizer", 1110, 1120),
        *kernel(2, 1115, 1400, 1900),
        *kernel(3, 1116, 1400, 1950, stream=20),  # beside it, and shorter in all
        memory(400, 5.0),
        memory(900, 3.0),
        memory(1200, 4.0),
        memory(1300, 2.0),
        memory(1900, 6.0),
    ]
    (step,) = steps_of_events(events)
    assert step.seconds == pytest.approx(900e-6)
    expected = {"data": 50e-6, "forward": 300e-6, "optimizer": 500e-6, "rest": 50e-6}
    assert step.parts == pytest.approx(expected)
    assert step.memory == {"allocated_peak_gib": 5.0, "reserved_peak_gib": 8.0}  # the level that the step begins with


def test_a_step_before_has_no_part_in_the_peak() -> None:
    events = [
        *(span("whole step", start, start + 1000) for start in (0, 1000)),
        *(span("measured train", start, start + 500) for start in (100, 1100)),
        *(memory(at, gib) for at, gib in ((200, 9.0), (500, 1.0), (700, 2.0), (1700, 7.0))),
    ]
    assert steps_of_events(events)[0].memory["allocated_peak_gib"] == 2.0


@pytest.mark.skipif(not torch.profiler.kineto_available(), reason="no kineto")
def test_the_profiler_names_changes_of_memory_as_expected(tmp_path: Path) -> None:
    with torch.profiler.profile(profile_memory=True) as profiler:
        torch.ones(1000)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    change = next(event for event in events if event.get("name") == "[memory]")
    assert change["args"]["Device Type"] == 0  # the CPU's
    assert {"Total Allocated", "Total Reserved"} <= change["args"].keys()


def test_curves_are_compared_with_the_same_steps() -> None:
    steps = [StepSpans(2.0, {"forward": 1.9, "data": 0.001, "rest": 0.099}, {"allocated_peak_gib": 10.0})] * 2
    curves = {
        "train/tokens": {5: 1000.0, 6: 2000.0, 7: 3000.0},
        "perf/step_seconds": {6: 2.0, 7: 2.02},
        "perf/tokens_per_second_per_gpu": {6: 500.0, 7: 495.0},
        "perf/model_tflops_per_gpu": {6: 1e-9, 7: 1e-9},
        "perf/mfu": {6: 0.5, 7: 0.5},
        "time/forward": {6: 1.8, 7: 1.8},
        "time/data": {6: 0.002, 7: 0.002},
        "time/rest": {6: 0.2, 7: 0.2},
        "memory/allocated_peak_gib": {6: 10.0, 7: 10.1},
    }
    rows = {row["curve"]: row for row in compare(curves, 6, steps, flops_per_token=2.0, peak=2000.0)}
    assert rows.keys() == curves.keys() - {"train/tokens"}
    assert rows["perf/step_seconds"]["difference"] == pytest.approx(0.005)
    assert rows["perf/mfu"]["profile"] == pytest.approx(0.5)
    verdicts = {curve: row["within"] for curve, row in rows.items()}
    assert [curve for curve, within in verdicts.items() if within is False] == ["time/forward"]
    assert [curve for curve, within in verdicts.items() if within is None] == ["time/data", "time/rest"]


def test_the_cost_counts_each_record_as_often_as_it_is_made() -> None:
    seconds = {"plain": 1.0, "before": 1.1, "after": 0.92, "logged": 1.01, "routing": 1.06, "heat map": 6.06}
    cost = cost_of_logging({step: seconds[kind_of(step)] for step in range(5, 97)})
    recorded = 0.05 / 50 + 5.0 / 500
    assert cost["cost_every_step"] == pytest.approx(0.01 + recorded)
    assert cost["cost_by_default"] == pytest.approx((0.01 + 0.02) / 10 + recorded)
    assert sum(cost["steps"].values()) == 92
    assert [kind_of(step) for step in range(INTERVAL, 2 * INTERVAL)] == ["logged", "after", "plain", "before"]


@pytest.mark.slow
def test_a_tiny_model_is_profiled_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "telemetry.json"
    command = [sys.executable, "-m", "tools.benchmarks.telemetry", "--out", str(out), "--shape", "tiny"]
    done = run_command([*command, "--tokens", "512", "--steps", "25"], {"OMP_NUM_THREADS": "1"})
    assert out.exists(), done.stdout  # a busy machine may miss the goals, with exit status 1
    record = json.loads(out.read_text())
    rows = {row["curve"]: row for row in record["rows"]}
    for curve in ("perf/step_seconds", "time/forward", "time/backward"):
        assert abs(rows[curve]["difference"]) < 0.1, rows[curve]
    assert rows.keys() >= {"perf/tokens_per_second_per_gpu", "time/data", "time/gradients", "time/optimizer"}
    assert record["cost"]["steps"]["logged"] == 3
    assert "perf/step_seconds" in out.with_suffix(".md").read_text()

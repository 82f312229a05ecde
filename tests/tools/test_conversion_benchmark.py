"""The conversion benchmark at its smallest, and the figures that the docs quote."""

import json
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "conversion_cpu.json"
WAYS = {"dense, continued", "straight", "warmup", "phase, then straight", "phase, then warmup"}

PRIORS = {f"prior_sigma {sigma}{ending}" for sigma in ("4", "1e+06") for ending in ("", ", warmup")}
PRIORS |= {"faster summary_query"}


@pytest.mark.slow
def test_every_way_is_measured_on_the_same_batches(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    job = "tests.tools.conversion_jobs:measure"
    run_ranks(job, 1, out, cpu_only=True)
    ways = json.loads(out.read_text())["ways"]
    assert ways.keys() == WAYS | {"dense training", "phase"} | PRIORS
    assert len(ways["phase"]["local_loss"]) == 3
    first = {name: ways[name]["loss"][0] for name in WAYS}
    assert first["dense, continued"] == pytest.approx(first["straight"], rel=0.05)
    assert ways["dense, continued"]["before"] == ways["dense training"]["after"]
    assert ways["phase"]["after"]["heldout"] == ways["phase"]["before"]["heldout"]  # the dense model stays
    assert ways["warmup"]["density"][0] > ways["straight"]["density"][0]


def test_the_figures_of_the_docs_are_complete() -> None:
    results = json.loads(RESULTS.read_text())
    assert results["machine"]["command"].startswith("python -m tools.benchmarks.conversion")
    assert results["ways"].keys() >= WAYS

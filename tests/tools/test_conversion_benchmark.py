"""The conversion benchmark at its smallest, and the figures that the docs quote."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results" / "conversion_cpu.json"
WAYS = {"dense, continued", "straight", "warmup", "phase, then straight", "phase, then warmup"}

PRIORS = {f"prior_sigma {sigma}{ending}" for sigma in ("4", "1e+06") for ending in ("", ", warmup")}
PRIORS |= {"prior_sigma 4, warmup, own rate of summary_query"}


@pytest.mark.slow
def test_every_way_is_measured_on_the_same_batches(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    job = "tests.tools.conversion_jobs:measure"
    run_ranks(job, 1, out, cpu_only=True)
    results = json.loads(out.read_text())
    ways = results["ways"]
    assert ways.keys() == WAYS | {"dense training", "phase"} | PRIORS
    assert len(ways["phase"]["local_loss"]) == 3
    first = {name: ways[name]["loss"][0] for name in WAYS}
    assert first["dense, continued"] == pytest.approx(first["straight"], rel=0.05)
    assert ways["dense, continued"]["before"] == ways["dense training"]["after"]
    assert ways["phase"]["after"]["heldout"] == ways["phase"]["before"]["heldout"]  # the dense model stays
    assert ways["warmup"]["density"][0] > ways["straight"]["density"][0]
    assert ways["straight"]["after"]["density"] < 0.9
    plain = {(one["kind"], one["prior_sigma"]): one for one in results["unchanged"]}
    trained = ways["dense training"]["after"]
    assert plain["dense", None] == plain["dense", None] | trained
    # Every chunk is selected. With a prior_sigma that is dense attention, and without one it is not.
    assert plain["dash", 1e6]["density"] == 1
    assert plain["dash", 1e6]["heldout"] == pytest.approx(trained["heldout"], abs=1e-3)
    assert plain["topk", None]["density"] < plain["dense", None]["density"]
    assert trained["right"].keys() == {"single at 320", "multi_key at 320"}
    table = " ".join(out.with_suffix(".md").read_text().split())
    assert "| infllmv2, 8 chunks |" in table, table
    assert f"| straight | {ways['straight']['before']['heldout']:.3f}" in table, table
    assert f"routing_scale 0.01, prior_sigma none | {plain['dash', None]['heldout']:.3f}" in table, table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": ["strait"]}, "there is no way strait: give some of dense, continued; straight"),
        ({"prior_sigma": -2.0}, "prior_sigma"),
        ({"warmup_steps": 3}, "--warmup-steps 3 is not below --steps 3"),
        ({"sequence_length": 20_000}, "raise --mebibytes"),
        ({"question_length": [500]}, "--question-length 500 is above 384"),
        ({"weights": Path("nowhere")}, "nowhere/model.yaml is not there"),
        ({"rotary_base": 1e6}, "give both"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (error,) = run_ranks("tests.tools.conversion_jobs:refused", 1, tmp_path / "figures.json", change, cpu_only=True)
    assert message in error


def test_the_figures_of_the_docs_are_complete() -> None:
    results = json.loads(RESULTS.read_text())
    assert results["machine"]["command"].startswith("python -m tools.benchmarks.conversion")
    assert results["ways"].keys() >= WAYS


def test_the_tables_of_the_pretrained_model_are_those_of_its_results() -> None:
    text = (DOCS / "extending.md").read_text()
    files = sorted((DOCS / "results").glob("conversion_smollm2_cpu*.json"))
    results = [json.loads(file.read_text()) for file in files]
    measured = [one for result in results for one in result["unchanged"]]
    measured += [curve["after"] for result in results for curve in result["ways"].values()]
    assert len(measured) >= 13
    for one in measured:
        density = "1" if one["density"] == 1 else f"{one['density']:.3f}"
        right = " | ".join(f"{share:.2f}" for share in one["right"].values())
        assert f"| {one['heldout']:.3f} | {density} | {right} |" in text

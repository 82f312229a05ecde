"""Properties of predictions, the search, calibration, and the command."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_dist.cli import app
from dash_dist.config.file import to_yaml
from dash_dist.config.parallel import RecomputeModule
from dash_dist.errors import ConfigError
from dash_dist.planning import GPUS, Assumptions, Prediction, best_layouts, predict
from dash_dist.planning.advice import what_would_help
from dash_dist.planning.calibration import calibrate, fit, predict_measured
from dash_dist.planning.command import Options, run_plan
from dash_dist.planning.measurements import Measurement, read_measurements
from dash_dist.planning.recompute import WAYS, Recompute
from dash_dist.planning.search import layouts
from dash_dist.planning.selection import tile_efficiency, union
from tests.planning.planning_cases import DENSE, large_config, layout, machine, small_config

CONFIGS = Path(__file__).parents[2] / "configs"
VOCAB_SIZE = 128_000
SHORT = {"steps": 2, "sequence_length": 2**17, "global_batch_size": 8}
GIB = 2**30


def predicted(config: Any = None, assumptions: Assumptions | None = None, **sizes: Any) -> Prediction:
    chosen = layout(**sizes)
    return predict(
        config or large_config(),
        chosen,
        machine(chosen.gpus),
        assumptions or Assumptions(),
        vocab_size=VOCAB_SIZE,
    )


sizes = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from((1, 2, 4)),
        "context": st.sampled_from((1, 2, 8, 32)),
        "pipeline": st.sampled_from((1, 2, 4)),
        "data": st.sampled_from((1, 2, 8)),
        "exchange": st.sampled_from(("auto", "selective", "allgather", "ring")),
        "recompute": st.sampled_from(("none", "selective", "full")),
    }
)
densities = st.floats(0.005, 1.0)


@settings(deadline=None)
@given(chosen=sizes, density=densities, independence=st.floats(0, 1))
def test_more_of_a_kind_of_parallelism_never_takes_more_memory(
    chosen: dict[str, Any], density: float, independence: float
) -> None:
    assumptions = Assumptions(density=density, independence=independence)
    before = predicted(assumptions=assumptions, **chosen).peak
    for name in ("tensor", "data"):
        more = predicted(assumptions=assumptions, **{**chosen, name: chosen[name] * 2}).peak
        assert more.weights + more.gradients + more.optimizer <= (
            before.weights + before.gradients + before.optimizer + 2**20  # padding
        )
    if chosen["exchange"] == "ring" and chosen["context"] > 1:  # which holds no more than two shards
        longer = predicted(assumptions=assumptions, **{**chosen, "context": chosen["context"] * 2}).peak
        assert longer.total <= before.total
    ways = [
        predicted(assumptions=assumptions, **{**chosen, "recompute": way.mode, "modules": way.modules}) for way in WAYS
    ]
    none, projections, mlp, selective, full = ways
    for more, less in ((projections, none), (mlp, none), (selective, projections), (selective, mlp), (full, selective)):
        assert more.peak.optimizer == less.peak.optimizer
        assert more.seconds >= less.seconds * (1 - 1e-9)
        assert more.flops > less.flops


@settings(deadline=None)
@given(chosen=sizes, lower=densities, higher=densities, independence=st.floats(0, 1))
def test_denser_or_longer_is_never_faster(
    chosen: dict[str, Any], lower: float, higher: float, independence: float
) -> None:
    lower, higher = sorted((lower, higher))
    sparse, dense = (
        predicted(assumptions=Assumptions(density=density, independence=independence), **chosen)
        for density in (lower, higher)
    )
    assert sparse.seconds <= dense.seconds * (1 + 1e-9)
    assert sparse.model_flops <= dense.model_flops
    assert 0 < dense.mfu < 1
    training = {"steps": 2, "sequence_length": 2**21, "global_batch_size": 8}
    assert predicted(large_config(training=training), **chosen).seconds > predicted(**chosen).seconds


@settings(deadline=None)
@given(density=densities, tokens=st.integers(1, 2**20), independence=st.floats(0, 1))
def test_a_union_of_selections_is_between_one_tokens_and_all(density: float, tokens: int, independence: float) -> None:
    assumptions = Assumptions(density=density, independence=independence)
    assert density - 1e-9 <= union(tokens, assumptions) <= 1
    assert union(tokens, assumptions) <= union(2 * tokens, assumptions) + 1e-12
    assert 0 < tile_efficiency(tokens, assumptions) <= 1 + 1e-9


def test_first_pipeline_stages_hold_more_micro_batches() -> None:
    config = large_config(training=SHORT)
    first, last = predicted(config, DENSE, pipeline=4, context=2).memory
    layers = predicted(config, DENSE, pipeline=4, context=2, recompute="full").memory[0]
    assert first.activations > 2 * last.activations  # four in flight against one, and the logits
    assert layers.activations < first.activations / 2


def test_what_goes_between_nodes_is_counted_there() -> None:
    inside = predicted(context=8)
    across = predicted(context=32)
    tensor = predicted(tensor=8, context=2)
    assert inside.sent["exchange"].network == 0
    assert across.sent["exchange"].network > 0
    assert tensor.sent["exchange"].network > 0  # the eight ranks of a node are one tensor-parallel group
    assert tensor.sent["tensor"].network == 0
    assert predicted(data=8).sent["gradients"].network == 0
    assert predicted(data=16).sent["gradients"].network > 0


@pytest.mark.parametrize(("gpus", "memory"), [(8, 79.2), (16, 40.0), (64, 24.0)])
def test_the_best_are_the_best_of_all(gpus: int, memory: float) -> None:
    config, on = large_config(training=SHORT), machine(gpus, memory)
    best, looked_at = best_layouts(config, on, Assumptions(), vocab_size=VOCAB_SIZE)
    every = [predict(config, one, on, Assumptions(), vocab_size=VOCAB_SIZE) for one in layouts(config, on)]
    assert looked_at[: len(every)] == every
    # Every number of layers, where none is too few and something could still be faster than the third best.
    some = [
        dataclasses.replace(way.layout, recompute=way.layout.recompute.of_layers(layers))
        for none, *ways in (every[first : first + len(WAYS)] for first in range(0, len(every), len(WAYS)))
        for way in ways
        for layers in range(1, 32 // way.layout.pipeline)
        if not none.fits and none.seconds < best[-1].seconds
    ]
    partly = [predict(config, one, on, Assumptions(), vocab_size=VOCAB_SIZE) for one in some]
    fastest: dict[Any, float] = {}
    for one in [*every, *(one for one in partly if not one.is_tight)]:
        if one.peak.total <= memory * GIB:
            sizes = dataclasses.replace(one.layout, exchange="", recompute=Recompute())
            fastest[sizes] = min(one.seconds, fastest.get(sizes, one.seconds))
    assert best
    assert [one.seconds for one in best] == sorted(fastest.values())[:3]
    assert all(one.layout.gpus == gpus for one in looked_at)


def test_where_nothing_fits_it_says_what_is_missing_and_what_would_do() -> None:
    config, on = large_config(), machine(8, 16.0)
    best, looked_at = best_layouts(config, on, Assumptions(), vocab_size=VOCAB_SIZE)
    assert not best
    lines = "\n".join(what_would_help(config, on, Assumptions(), None, best, looked_at, vocab_size=VOCAB_SIZE))
    assert "GiB too much" in lines
    gpus = int(next(line for line in lines.splitlines() if "GPUs are enough" in line).split()[0])
    assert best_layouts(config, machine(gpus, 16.0), Assumptions(), vocab_size=VOCAB_SIZE)[0]
    assert not best_layouts(config, machine(gpus // 2, 16.0), Assumptions(), vocab_size=VOCAB_SIZE)[0]


@pytest.mark.parametrize(
    ("recompute", "modules", "memory", "change"),
    [
        ("none", None, 50.0, "parallel.recompute=selective parallel.recompute_layers=26"),
        (
            "none",
            None,
            79.2,
            "parallel.recompute=selective parallel.recompute_modules=[mlp] parallel.recompute_layers=16",
        ),
        (
            "selective",
            ("mlp",),
            50.0,
            "parallel.recompute=selective parallel.recompute_modules=null parallel.recompute_layers=26",
        ),
        (
            "selective",
            ("projections",),
            35.0,
            "parallel.recompute=selective parallel.recompute_modules=null parallel.recompute_layers=29 "
            "parallel.mlp_tile_tokens=16384 parallel.offload_activations=1.0",
        ),
        (
            "none",
            None,
            30.0,
            "parallel.recompute=full parallel.recompute_layers=30 parallel.mlp_tile_tokens=16384 "
            "parallel.offload_activations=1.0",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_told_the_smallest_change(
    recompute: str, modules: tuple[RecomputeModule, ...] | None, memory: float, change: str
) -> None:
    config, on = large_config(training=SHORT, parallel={"tensor": 4, "context": 2}), machine(8, memory)
    own = layout(tensor=4, context=2, recompute=recompute, modules=modules)
    asked = predict(config, own, on, Assumptions(), vocab_size=VOCAB_SIZE)
    best, looked_at = best_layouts(config, on, Assumptions(), vocab_size=VOCAB_SIZE)
    assert not asked.fits
    (line,) = what_would_help(config, on, Assumptions(), asked, best, looked_at, vocab_size=VOCAB_SIZE)
    assert line.endswith(f": {change}")


def measured(name: str, *, dense: float, independence: float, more_gib: float = 0.5, **sections: Any) -> Measurement:
    """A run as the planner would predict it, were these its constants."""
    config = large_config(run={"name": name}, **sections)
    one = Measurement(name, to_yaml(config), 1, None, 8, 1.0, 1.0, 1.0, 0.1)
    truth = predict_measured(one, Assumptions(dense_factor=dense, independence=independence), gpu="H100")
    return dataclasses.replace(one, step_seconds=truth.seconds, allocated_gib=truth.peak.allocated / GIB + more_gib)


def runs(**constants: float) -> list[Measurement]:
    short = {"training": {"steps": 2, "sequence_length": 2**14, "global_batch_size": 8}}
    return [measured("short", **constants, **short), measured("long", **constants)]


def test_calibration_finds_the_constants_of_the_runs() -> None:
    found = fit(runs(dense=1.3, independence=0.7), gpu="H100")
    assert (found.dense_factor, found.independence) == (pytest.approx(1.3), pytest.approx(0.7))
    assert found.attention_factor == 1.0
    assert found.memory_offset == pytest.approx(0.5 * GIB)
    assert found.runs == ("short", "long")


def test_of_one_run_one_factor_is_found() -> None:
    (_, long) = runs(dense=1.3, independence=0.5)
    found = fit([long], gpu="H100")
    assert found.independence is None
    assert found.dense_factor == found.attention_factor
    again = predict_measured(long, found.apply(Assumptions()), gpu="H100")
    assert again.seconds == pytest.approx(long.step_seconds)
    assert again.peak.allocated == pytest.approx(long.allocated_gib * GIB)


def test_on_a_gpu_without_measured_kernels_both_factors_are_found() -> None:
    factors = {"dense_factor": 0.9, "attention_factor": 1.6}
    given_runs = [
        dataclasses.replace(one, step_seconds=predict_measured(one, Assumptions(**factors), gpu="A100").seconds)
        for one in runs(dense=1.0, independence=0.5)
    ]
    found = fit(given_runs, gpu="A100")
    assert {name: getattr(found, name) for name in factors} == pytest.approx(factors)


def test_the_published_measurements_are_of_configurations_that_are_still_known() -> None:
    published = read_measurements(Path(__file__).parents[2] / "docs" / "results" / "plan_h100.json")
    assert [one.run_config().run.name for one in published] == [one.name for one in published]
    assert published


def test_a_calibration_is_read_back_from_its_file(tmp_path: Path) -> None:
    found = fit(runs(dense=1.1, independence=0.2), gpu="H100")
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(found.as_json()))
    assert calibrate([path], gpu="H100") == found
    with pytest.raises(ConfigError, match="give --gpu H100"):
        calibrate([path], gpu="A100")
    measurements = tmp_path / "runs.json"
    measurements.write_text(json.dumps({"measurements": [one.as_json() for one in runs(dense=1.1, independence=0.2)]}))
    assert calibrate([measurements], gpu="H100") == found


def dash_dist(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `dash-dist` prints. Raises what the command raises."""
    app(["plan", *arguments], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo", "llama_1b_128k", "plan_check"])
def test_every_configuration_can_be_planned(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    output = dash_dist(f"{CONFIGS / name}.yaml", "--gpus", "8", "--json", str(path), capsys=capsys)
    plan = json.loads(path.read_text())
    assert f"{plan['layouts']} layouts" in output
    for one in (plan["config"] or plan["best"][0], *plan["best"]):
        memory = one["memory_bytes"]
        parts = ("weights", "gradients", "optimizer", "activations", "attention", "communication", "reserve")
        assert sum(memory[part] for part in parts) == pytest.approx(memory["total"])
        assert sum(value for part, value in one["seconds"].items() if part != "total") == pytest.approx(
            one["seconds"]["total"]
        )
        assert one["fits"] == (memory["total"] <= plan["machine"]["memory"])
    assert f"{plan['best'][0]['seconds']['total']:.4g}" in output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--gpu", "V100"], "--gpu V100"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "12"], "--gpus 12"),
        (["--density", "0"], "--density 0"),
        (["--coverage", "1.5"], "--coverage 1.5"),
        (["--independence", "2"], "--independence 2"),
        (["--gpu-memory", "-1"], "--gpu-memory -1"),
        (["--calibrate", "nowhere"], "--calibrate nowhere"),
        (["--json", "no/such/folder/plan.json"], "--json no/such/folder/plan.json"),
    ],
)
def test_an_impossible_option_is_named(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=named):
        dash_dist(str(CONFIGS / "plan_check.yaml"), *options, capsys=capsys)


def test_an_impossible_layout_is_explained_and_others_are_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    output = dash_dist(str(CONFIGS / "llama_1b_128k.yaml"), "--gpus", "4", capsys=capsys)
    assert "cannot run on 4 GPUs: world size 4 is not a multiple of" in output
    assert "The best of" in output


def test_a_layout_is_printed_with_all_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "parallel.tensor=2",
        "parallel.context=4",
        "parallel.recompute_modules=[mlp]",
        "parallel.sequence_parallel=false",
    ]
    output = dash_dist(str(CONFIGS / "llama_1b_128k.yaml"), *settings, "--gpus", "8", capsys=capsys)
    assert "TP 2 x CP 4 x PP 1 x DP 1, auto, recompute selective [mlp], whole sequences in TP" in output


def test_every_stage_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((CONFIGS / "llama_1b_128k.yaml").read_text())
    lengths = {"short": 32768, "long": 131072}
    del content["training"]["steps"]
    content["optimizer"]["warmup_steps"] = 2
    content["stages"] = [
        {"name": name, "steps": 5, "training": {"sequence_length": length}} for name, length in lengths.items()
    ]
    config, out = tmp_path / "staged.yaml", tmp_path / "plan.json"
    config.write_text(yaml.safe_dump(content))
    run_plan(config, [], Options(gpus=8, vocab_size=128_256), json_path=out)
    text = capsys.readouterr().out
    for name, length, steps in (("short", 32768, "1 to 5"), ("long", 131072, "6 to 10")):
        assert re.search(rf"Stage {name}, steps {steps}\n(?s:.*?)x {length:,} ", text)
    plans = json.loads(out.read_text())["stages"]
    seconds = [plans[name]["config"]["seconds"]["total"] for name in lengths]
    assert seconds[0] < seconds[1]


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from dash_dist.cli import app; "
        f"app(['plan', {str(CONFIGS / 'llama_1b_128k.yaml')!r}, '--gpus', '8'], standalone_mode=False); "
        "assert not {'torch', 'megatron', 'triton'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_the_table_of_gpus_is_that_of_the_runs_mfu() -> None:
    from dash_dist.training.telemetry.device import _PEAK_BF16_FLOPS

    assert {name: gpu.flops for name, gpu in GPUS.items()} == {name: _PEAK_BF16_FLOPS[name] for name in GPUS}


def test_a_small_configuration_is_planned_as_it_stands() -> None:
    assert predict(small_config(), layout(), machine(1), DENSE, vocab_size=257).fits

"""`dash-dist profile` of a tiny run on CPUs: alone, over ranks, and refused; and the table in the report."""

import json

import pytest
import yaml

from dash_dist.profiling.anatomy import anatomy_of
from dash_dist.profiling.parts import PARTS
from dash_dist.profiling.trace import read_trace
from dash_dist.report import write_report
from dash_dist.run.profile import Profile, read_profile
from tests.support.ranks import run_ranks
from tests.support.runs import TINY

JOB = "tests.profiling.profiling_jobs:profiled"
ALONE = ["parallel.context=1"]


def write_config(folder, **changes):
    settings = {**TINY, "run": {"name": "tiny", "directory": str(folder / "runs")}, **changes}
    settings["model"] = {**TINY["model"], "num_layers": 1}
    settings["attention"] = {**TINY["attention"], "chunk_size": 16}
    settings["training"] = {**TINY["training"], "sequence_length": 64, "global_batch_size": 1}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def check(profile):
    """Whatever a profile says, its parts and its gaps are the step."""
    assert sum(part.seconds for part in profile.parts) + profile.gap_seconds == pytest.approx(profile.profiled_seconds)
    assert all(0 <= part.seconds <= part.seconds_max for part in profile.parts)
    order = list(PARTS)
    assert [order.index(part.part) for part in profile.parts] == sorted(
        order.index(part.part) for part in profile.parts
    )


@pytest.mark.slow
def test_alone_it_writes_a_profile_and_a_trace_and_nothing_else_of_the_run(tmp_path):
    (((profile, output),),) = run_ranks(JOB, 1, write_config(tmp_path), [(ALONE, {"steps": 2})], cpu_only=True)
    assert isinstance(profile, Profile), output
    check(profile)
    run = tmp_path / "runs" / "tiny"
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == [
        "profile",
        "profile/profile.json",
        "profile/trace_rank_00000.json.gz",
    ]
    assert read_profile(run / "profile") == profile
    trace = read_trace(run / "profile" / "trace_rank_00000.json.gz")
    assert (trace.steps, trace.on_gpu) == (2, False)
    assert anatomy_of(trace).gap / 2e6 == pytest.approx(profile.gap_seconds)

    parts = {part.part: part for part in profile.parts}
    expected = {"summarize", "route", "attend", "row_dots", "query_gradient", "key_gradient", "matmul", "norm", "mlp"}
    expected |= {"around_attention", "embedding", "output_matmul", "loss", "accumulation", "optimizer", "data_gaps"}
    assert expected <= parts.keys()
    assert "other" not in parts
    # Products of a layer of 4 heads of 8 and 2 KV heads, and of the output layer: forward, and twice backward.
    weights = {"matmul": 32 * (32 + 2 * 16 + 32 + 3 * 64), "output_matmul": 32 * 320}
    for part, numbers in weights.items():
        known = parts[part].flops_per_second * parts[part].device_seconds
        assert known == pytest.approx(6 * numbers * 64, rel=1e-6), part
    assert (profile.mfu, profile.ranks, profile.steps) == (None, 1, 2)
    assert profile.tokens_per_second_per_gpu == pytest.approx(64 / profile.step_seconds)
    assert 0 < profile.density <= 1
    for text in ("attention: routing", "gaps: elsewhere", "step without the profiler", "rss peak"):
        assert text in output
    assert "slowest" not in output

    page = write_report(run).read_text()
    assert "A step's anatomy" in page
    assert "attention: key gradient" in page
    assert f"{parts['attend'].seconds * 1e3:,.2f}" in page


@pytest.mark.slow
def test_over_ranks_there_is_one_profile_and_a_trace_of_each(tmp_path):
    path, out = write_config(tmp_path), tmp_path / "elsewhere"
    (out / "trace_rank_00007.json.gz").parent.mkdir()
    (out / "trace_rank_00007.json.gz").touch()  # of a profile with more ranks
    commands = [
        ([], {"steps": 2, "out": out}),
        (["engine=deepspeed", *ALONE, "training.global_batch_size=2"], {"steps": 1, "out": out / "zero"}),
    ]
    (context, zero), others = run_ranks(JOB, 2, path, commands, cpu_only=True)
    (profile, output), (of_deepspeed, _) = context, zero
    assert [found for found, _ in others] == [profile, of_deepspeed]
    assert others[0][1] == ""  # rank 0 prints
    for one in (profile, of_deepspeed):
        check(one)
        assert one.ranks == 2
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", *profile.traces, "zero"]
    parts = {part.part: part for part in profile.parts}
    exchange = parts["exchange"]
    assert exchange.count > 0
    assert exchange.seconds <= exchange.device_seconds
    assert {"packing", "gradients", "collectives"} <= parts.keys()
    assert "slowest ms" in output
    assert not (tmp_path / "runs").exists()
    assert {"optimizer", "matmul", "attend"} <= {part.part for part in of_deepspeed.parts}


def test_what_cannot_be_profiled_is_refused_at_every_rank(tmp_path):
    path, blocked = write_config(tmp_path), tmp_path / "file"
    blocked.write_text("")
    commands = [
        (ALONE, {"out": blocked / "profile"}),
        (ALONE, {"stage": "64k"}),
        (["parallel.context=2"], {}),
        (["parallel.contxt=4"], {}),
    ]
    (results,) = run_ranks(JOB, 1, path, commands, cpu_only=True)
    assert [found for found, _ in results] == [None] * 4
    unwritable, stage, size, setting = (message for _, message in results)
    assert unwritable.startswith(f"RunError: cannot write {blocked / 'profile'}: Not a directory")
    assert stage == "ConfigError: --stage 64k: the run has no stages; drop the option"
    assert size.startswith("ConfigError: the profile cannot start: world size 1")
    assert "parallel.contxt" in setting
    (((found, missing),),) = run_ranks(JOB, 1, tmp_path / "none.yaml", [([], {})], cpu_only=True)
    assert found is None
    assert missing.startswith(f"ConfigError: cannot read the configuration {tmp_path / 'none.yaml'}")


@pytest.mark.slow
def test_a_folder_that_one_rank_cannot_write_is_an_error_at_all(tmp_path):
    path, blocked = write_config(tmp_path), tmp_path / "file"
    blocked.write_text("")
    results = run_ranks(JOB, 2, path, [([], {"out": [tmp_path / "out", blocked / "out"]})], cpu_only=True)
    for ((found, message),) in results:
        assert found is None
        assert message.endswith(f"Not a directory: {blocked / 'out'}")


@pytest.mark.slow
def test_a_stage_is_profiled_in_its_own_settings(tmp_path):
    stages = [
        {"name": "short", "steps": 3},
        {"name": "long", "steps": 3, "training": {"sequence_length": 128}},
    ]
    path = write_config(tmp_path, stages=stages)
    settings = yaml.safe_load(path.read_text())
    del settings["training"]["steps"]
    path.write_text(yaml.safe_dump(settings))
    commands = [(ALONE, {"steps": 1, "stage": "long"}), (ALONE, {"stage": "longer"})]
    (((profile, _), (_, refused)),) = run_ranks(JOB, 1, path, commands, cpu_only=True)
    assert profile.stage == "long"
    assert profile.tokens_per_second_per_gpu == pytest.approx(128 / profile.step_seconds)
    assert refused == "ConfigError: --stage longer: give one of short, long"


def test_a_file_that_is_no_profile_is_named(tmp_path):
    assert read_profile(tmp_path) is None
    (tmp_path / "profile.json").write_text(json.dumps({"parts": [], "speed": 1}))
    with pytest.raises(ValueError, match=r"profile\.json is not a profile of this version"):
        read_profile(tmp_path)

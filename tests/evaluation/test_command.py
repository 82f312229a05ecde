"""`dash-dist evaluate` of tiny runs: the same at every layout, resumed, refused, and as in transformers."""

import dataclasses
import json
import shutil

import pytest
import yaml

from tests.support.ranks import run_ranks
from tests.support.runs import TINY

pytestmark = pytest.mark.slow

JOBS = "tests.evaluation.evaluation_jobs"
LENGTH = 512
ONE = {"lengths": ("512",), "samples": 1}
TRACKING = ONE | {"suite": "variable_tracking"}  # one task of a suite
CHECKPOINT = "step_00000004"


def write_config(folder):
    settings = {**TINY, "run": {"name": "tiny", "directory": str(folder / "runs")}}
    settings["training"] = {**TINY["training"], "sequence_length": LENGTH, "steps": 4}
    settings["model"] = {**TINY["model"], "init_std": 0.2}  # continuations of many different tokens
    settings["optimizer"] = {"lr": 1.0e-3, "warmup_steps": 1}
    settings["checkpoint"] = {"interval": 2, "keep": 5}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    overrides = [
        ["run.name=tiny", "parallel.context=1"],
        ["run.name=dense", "parallel.context=1", "attention.kind=dense"],
        ["run.name=zero", "parallel.context=1", "engine=deepspeed"],
    ]
    (errors,) = run_ranks(f"{JOBS}:train", 1, write_config(folder), overrides, cpu_only=True)
    assert errors == [""] * 3
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run, without results."""
    return shutil.copytree(folder / "runs" / "tiny", tmp_path / "tiny")


def evaluations(run, *commands, world_size=1):
    return run_ranks(f"{JOBS}:evaluations", world_size, run, list(commands), cpu_only=True)


def without_seconds(groups):
    return [dataclasses.replace(group, seconds=0.0) for group in groups]


def test_results_are_whole_and_a_second_command_completes_them(run):
    first = ([], ONE | {"routing_scales": (1.0,), "suite": "aggregation", "lengths": ("700",)})
    again = ([], first[1] | {"routing_scales": (1.0, 64.0)})
    (((groups, output), (more, again_output)),) = evaluations(run, first, again)
    assert "2 groups" not in output
    assert "2 of 4 groups are in" in again_output
    assert more[:2] == groups  # seconds included: they were not evaluated again
    assert all(0.05 < sparser.density < 0.9 * group.density for group, sparser in zip(groups, more[2:], strict=True))
    content = json.loads((run / "evaluation" / "aggregation-00000004.json").read_text())
    assert content["settings"]["checkpoint"] == CHECKPOINT
    assert content["versions"].keys() == {"dash-dist", "torch", "megatron-core"}
    assert [one["task"] for one in content["groups"]] == [group.task for group in more]
    for one in content["groups"]:
        assert (one["length"], one["count"], len(one["samples"])) == (700, 1, 1)
        assert one["accuracy"] == one["samples"][0]["score"]
        assert 1 <= one["passes"] <= 40
    assert (run / "evaluation" / "aggregation-00000004.png").read_bytes()[:4] == b"\x89PNG"
    assert "700 tokens are beyond the 512 that the model was trained on" in output
    header, trained, sparse, _ = again_output.splitlines()[-4:]
    assert header.split() == ["length", "scale", "density", *(group.task for group in groups), "mean"]
    assert [row.split()[:2] for row in (trained, sparse)] == [["700", "1"], ["700", "64"]]


def test_every_layout_gives_the_tokens_of_one_process(run):
    odd = TRACKING | {"lengths": ("501",)}  # padded where ranks share a sequence
    (((expected, _),),) = evaluations(run, ([], odd | {"output": run / "alone.json"}))
    assert len(set("".join(one.given for group in expected for one in group.samples))) > 7
    layouts = ("context=2", "tensor=2", "pipeline=2", "context=1")
    commands = [([f"parallel.{layout}"], odd | {"output": run / f"{layout}.json"}) for layout in layouts]
    for rank in evaluations(run, *commands, world_size=2):
        for groups, output in rank:
            assert groups, output
            for group, alone in zip(groups, expected, strict=True):
                assert [one.given for one in group.samples] == [one.given for one in alone.samples]
                assert group.density == pytest.approx(alone.density, rel=0.02)


def test_the_continuations_are_those_of_transformers(run):
    (((groups, _),),) = evaluations(run, ([], ONE))
    single = next(group for group in groups if group.task == "single")
    arguments = (run / "checkpoints" / CHECKPOINT, run / "export", LENGTH, 1)
    (given,) = run_ranks(f"{JOBS}:in_transformers", 1, *arguments, cpu_only=True)
    assert [one.given for one in single.samples] == given


def test_dense_runs_and_deepspeed_runs_are_evaluated(folder):
    for name in ("dense", "zero"):
        path = folder / "runs" / name
        (((groups, output),),) = evaluations(path, ([], TRACKING))
        assert len(groups) == 1, output
        assert [group.routing_scale for group in groups] == [None if name == "dense" else 8.0]
    assert "scale" not in evaluations(folder / "runs" / "dense", ([], TRACKING))[0][0][1]


def test_a_checkpoint_by_its_step_or_folder_and_a_layout_that_does_not_fit(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("context: 1", "context: 4"))
    commands = (([], TRACKING | {"step": 2}), ([], TRACKING))
    (((_, by_step), _),) = evaluations(run, *commands)
    (((groups, by_folder),),) = evaluations(run / "checkpoints" / "step_00000002", ([], TRACKING))
    assert "tp 1 x cp 4 x pp 1, does not fit 1 process: evaluating with parallel.context=1" in by_step
    assert "1 of 1 groups are in" in by_folder
    assert len(groups) == 1


def test_bad_input_is_refused_by_name(run, tmp_path):
    limited = ["model.positions.max_positions=600"]
    other = run / "other.json"
    other.write_text("[]")
    commands = [
        (limited, {"lengths": ("1K",)}),
        ([], {"lengths": ("64",)}),
        ([], {"step": 7}),
        ([], ONE | {"output": other}),
        ([], ONE | {"suite": "nothing"}),
        ([], ONE | {"routing_scales": (0.0,)}),
        ([], ONE | {"routing_scales": (2.0, 2.0)}),
        (["attention.kind=dense"], ONE | {"routing_scales": (2.0,)}),
        (["parallel.context=2"], ONE),
        ([], ONE),
        ([], ONE | {"seed": 1}),
        (["model.tie_embeddings=true"], ONE | {"output": run / "tied.json"}),
    ]
    (outcomes,) = evaluations(run, *commands)
    beyond, short, step, foreign, suite, zero, twice, dense, layout, good, seed, tied = [error for _, error in outcomes]
    assert "sequence length 1024 is beyond model.positions.max_positions 600: set it to 1024" in beyond
    assert "64 tokens are too few for task single: it needs about" in short
    assert "step_00000007 is not there: the run has the checkpoints of steps 2, 4" in step
    assert "other.json holds no results of an evaluation" in foreign
    assert "--suite nothing: give one of retrieval, tracking, aggregation, all" in suite
    assert "--routing-scale 0.0: give numbers above 0" in zero
    assert "--routing-scale 2.0 2.0: give each once" in twice
    assert "the run has attention.kind dense, which routes nothing" in dense
    assert "world size 1 is not a multiple of tensor x pipeline x context" in layout
    assert outcomes[9][0], good
    assert "has results with seed = 0, and here it is 1: give another file with --output" in seed
    assert "tie_embeddings is False in the checkpoint and True in this run" in tied
    assert all(error.startswith("ConfigError: ") for error in (beyond, short, step, foreign, dense, layout, seed))
    (nothing,) = evaluations(tmp_path / "nothing", ([], ONE))
    assert "is neither a run nor a checkpoint of one" in nothing[0][1]


def test_a_damaged_checkpoint_is_refused_at_every_rank(run):
    file = next((run / "checkpoints" / CHECKPOINT / "engine").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    errors = [outcome[0][1] for outcome in evaluations(run, (["parallel.context=2"], ONE), world_size=2)]
    assert errors[0] == errors[1]
    assert "is damaged: its CRC-32 is" in errors[0]
    assert "name another checkpoint with --step" in errors[0]


def test_an_error_at_one_rank_is_one_at_every_rank(run):
    errors = run_ranks(f"{JOBS}:failing_at_rank_1", 2, run, ONE, cpu_only=True)
    assert errors == ["ConfigError: the samples cannot be made: no sample here"] * 2


def test_the_gate_is_measured_by_the_runs_own_engine(folder):
    for accuracy, error in run_ranks(f"{JOBS}:gates", 2, write_config(folder), cpu_only=True):
        assert accuracy == 0.0
        assert "64 tokens are too few for task single" in error

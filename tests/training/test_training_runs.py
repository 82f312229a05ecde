"""Whole runs of a tiny model: stopped and resumed, at the same and at other layouts, and ended from outside."""

import math
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from training_runs import losses, rank_processes, read_curves, run_ranks, write_config

from dash_dist.training import CheckpointError, ConfigError, RunError, load_config, train

RANK = str(Path(__file__).with_name("training_rank.py"))
NEVER = "1000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on 2 context-parallel ranks: `whole` of 20 steps, and `stopped` after step 10 of 20."""
    folder = tmp_path_factory.mktemp("runs")
    config = str(write_config(folder))
    jobs = [config, NEVER, "run.name=whole", "--", config, "10", "run.name=stopped"]
    for status, output in run_ranks([RANK, *jobs], 2):
        assert status == 0, output
    return folder


def resume(folder, name, world_size, *overrides):
    """A copy of the stopped run goes on as `name`."""
    shutil.copytree(folder / "runs" / "stopped", folder / "runs" / name)
    arguments = [RANK, str(folder / "tiny.yaml"), NEVER, f"run.name={name}", *overrides]
    for status, output in run_ranks(arguments, world_size):
        assert status == 0, output
    return losses(folder / "runs" / name)


def test_the_stopped_run_left_its_checkpoint(folder):
    stopped = folder / "runs" / "stopped"
    assert list(losses(stopped)) == list(range(1, 11))
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_00000010"]


def test_resumed_at_the_same_layout_the_losses_are_those_of_one_run(folder):
    whole = losses(folder / "runs" / "whole")
    assert list(whole) == list(range(1, 21))
    assert resume(folder, "same", 2) == whole  # bit for bit


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ["parallel.context=1"]),
        (2, ["parallel.context=1", "parallel.tensor=2"]),
        (2, ["parallel.context=1"]),
    ],
    ids=["cp2-to-one-rank", "cp2-to-tp2", "cp2-to-dp2"],
)
def test_resumed_at_another_layout_the_losses_are_those_of_one_run(folder, request, world_size, overrides):
    resumed = resume(folder, request.node.callspec.id, world_size, *overrides)
    assert resumed == pytest.approx(losses(folder / "runs" / "whole"), rel=2e-5)


def test_the_whole_run_wrote_every_curve(folder):
    curves = read_curves(folder / "runs" / "whole")
    assert set(curves.Tags()["scalars"]) == {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens",
        "perf/tokens_per_second_per_gpu",
        "perf/step_seconds",
        "memory/rss_peak_gib",
        "routing/density/layer_0",
        "routing/density/layer_1",
    }
    assert set(curves.Tags()["histograms"]) == {
        "routing/selected_chunks/layer_0",
        "routing/selected_chunks/layer_1",
    }
    # 2 sequences of 256 tokens a step, not once more for each context-parallel rank.
    assert [event.value for event in curves.Scalars("train/tokens")] == [512 * step for step in range(1, 21)]
    seconds = curves.Scalars("perf/step_seconds")[5].value
    per_rank = curves.Scalars("perf/tokens_per_second_per_gpu")[5].value
    assert per_rank == pytest.approx(512 / seconds / 2, rel=1e-3)
    assert [event.step for event in curves.Scalars("routing/density/layer_0")] == [1, 5, 10, 15, 20]
    for layer in (0, 1):
        density = curves.Scalars(f"routing/density/layer_{layer}")[-1].value
        histogram = curves.Histograms(f"routing/selected_chunks/layer_{layer}")[-1].histogram_value
        assert 0 < density <= 1
        assert histogram.num == 256 * 2  # (token, KV head) pairs of the last micro-batch
        assert histogram.sum == pytest.approx(density * 2 * sum(i // 32 + 1 for i in range(256)), rel=1e-5)


def test_the_model_learns(folder):
    curve = losses(folder / "runs" / "whole")
    assert curve[1] == pytest.approx(math.log(257), abs=0.5)
    assert curve[20] < 0.8 * curve[1]


def test_the_resolved_configuration_is_beside_the_run(folder):
    saved = folder / "runs" / "whole" / "config.yaml"
    assert load_config(saved) == load_config(folder / "tiny.yaml", ["run.name=whole"])
    assert yaml.safe_load(saved.read_text())["optimizer"]["beta2"] == 0.95


def test_sigterm_to_one_rank_lets_all_save_and_leave(folder):
    overrides = ["run.name=asked", "training.steps=100000", "checkpoint.interval=50000"]
    arguments = ["-m", "dash_dist.cli", "train", str(folder / "tiny.yaml"), *overrides]
    with rank_processes(arguments, 2) as processes:
        for line in processes[0].stdout:
            if line.startswith("step 3/"):
                processes[1].send_signal(signal.SIGTERM)
                break
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert "stopped on request" in outputs[0]
    (checkpoint,) = (folder / "runs" / "asked" / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step_")) == max(losses(folder / "runs" / "asked"))


def test_a_rank_that_dies_ends_the_others(folder):
    overrides = ["run.name=dies", "training.steps=100000"]
    arguments = ["-m", "dash_dist.cli", "train", str(folder / "tiny.yaml"), *overrides]
    with rank_processes(arguments, 2) as processes:
        for line in processes[0].stdout:
            if line.startswith("step 3/"):
                processes[1].kill()
                break
        processes[0].communicate(timeout=90)  # the process group's own time limit is 60 seconds
        assert processes[0].returncode not in (0, None)


def alone(folder, name, *overrides):
    """Train in this process, as a world of one rank."""
    return train(load_config(folder / "tiny.yaml", [f"run.name={name}", "parallel.context=1", *overrides]))


def test_a_finished_run_does_nothing_more(folder):
    summary = alone(folder, "short", "training.steps=3", "checkpoint.keep=1")
    again = alone(folder, "short", "training.steps=3", "checkpoint.keep=1")
    assert (again.steps, again.completed) == (3, True)
    assert (again.first_loss, again.last_loss) == (summary.first_loss, summary.last_loss)
    assert list(losses(folder / "runs" / "short")) == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"run\.resume=never"):
        alone(folder, "short", "training.steps=3", "run.resume=never")


def test_another_model_does_not_resume(folder):
    alone(folder, "other_model", "training.steps=3")
    with pytest.raises(CheckpointError, match="num_layers is 2 in the checkpoint and 4 in this run"):
        alone(folder, "other_model", "training.steps=6", "model.num_layers=4")


def test_other_data_does_not_resume(folder):
    alone(folder, "other_data", "training.steps=3")
    with pytest.raises(CheckpointError, match=r"cannot go on from .*sequence_length 256, this run has 128"):
        alone(folder, "other_data", "training.steps=6", "training.sequence_length=128")


def test_missing_data_is_a_clear_error(folder):
    with pytest.raises(ConfigError, match=r"the run cannot start: data\.paths: 'no_such_folder'"):
        alone(folder, "no_data", "data.source=files", "data.paths=no_such_folder")


def test_a_loss_that_is_no_number_ends_the_run(folder, monkeypatch):
    from dash_dist.megatron import Engine, StepResult

    def diverged(engine, micro_batches):
        return StepResult(loss=math.nan, grad_norm=math.nan, learning_rate=1e-3, tokens=512, skipped=True)

    monkeypatch.setattr(Engine, "train_step", diverged)
    monkeypatch.setattr(Engine, "routing_statistics", lambda engine: [])  # no forward pass recorded any
    with pytest.raises(RunError, match=r"step 4: loss nan.*max_skipped_steps = 3.*lower optimizer\.lr"):
        alone(folder, "nan", "training.max_skipped_steps=3")
    assert not list((folder / "runs" / "nan").glob("checkpoints/step_*"))


def test_the_command_line_reports_a_wrong_world_size_at_one_rank_only(folder):
    arguments = ["-m", "dash_dist.cli", "train", str(folder / "tiny.yaml"), "parallel.context=4"]
    results = run_ranks(arguments, 2)
    assert [status for status, _ in results] == [2, 2]
    assert "world size 2 is not a multiple" in results[0][1]
    assert "Traceback" not in results[0][1]
    assert "error:" not in results[1][1]

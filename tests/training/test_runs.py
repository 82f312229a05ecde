"""Whole runs of a tiny model: stopped and resumed, at the same and at other layouts, and ended from outside."""

import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from dash_dist.config.file import load_config
from dash_dist.run.curve_names import PARTS
from dash_dist.run.events import EVENT_KINDS, EventLog
from tests.support.ranks import run_ranks
from tests.support.runs import losses, rank_processes, read_curves, run_rank_processes, write_config

pytestmark = pytest.mark.slow

RANK = str(Path(__file__).parents[1] / "support" / "training_rank.py")
NEVER = "1000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on 2 context-parallel ranks: `whole` of 20 steps, and `stopped` after step 10 of 20."""
    folder = tmp_path_factory.mktemp("runs")
    config = str(write_config(folder))
    jobs = [config, NEVER, "run.name=whole", "logging.heat_map_layers=null", "--", config, "10", "run.name=stopped"]
    for status, output in run_rank_processes([RANK, *jobs], 2, seconds=250):
        assert status == 0, output
    return folder


def resume(folder, name, world_size, *overrides):
    """A copy of the stopped run goes on as `name`."""
    shutil.copytree(folder / "runs" / "stopped", folder / "runs" / name)
    arguments = [RANK, str(folder / "tiny.yaml"), NEVER, f"run.name={name}", *overrides]
    for status, output in run_rank_processes(arguments, world_size):
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
        (2, ["parallel.context=1", "parallel.pipeline=2"]),
    ],
    ids=["cp2-to-one-rank", "cp2-to-tp2", "cp2-to-dp2", "cp2-to-pp2"],
)
def test_resumed_at_another_layout_the_losses_are_those_of_one_run(folder, request, world_size, overrides):
    resumed = resume(folder, request.node.callspec.id, world_size, *overrides)
    assert resumed == pytest.approx(losses(folder / "runs" / "whole"), rel=1e-5)


def test_the_whole_run_wrote_every_curve(folder):
    curves = read_curves(folder / "runs" / "whole")
    assert set(curves.Tags()["scalars"]) == {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens",
        "perf/tokens_per_second_per_gpu",
        "perf/step_seconds",
        "perf/model_tflops_per_gpu",
        "data/skipped_documents",
        "data/padding",
        "data/tokens/stdlib",
        "data/epochs/stdlib",
        "memory/rss_peak_gib",
        "routing/mean_density",
        "routing/density/layer_0",
        "routing/density/layer_1",
        "cp/planned_gib",
        "cp/sent_gib",
        "cp/slow_link_gib",
        "cp/dense_gib",
        "cp/coverage/layer_0",
        "cp/coverage/layer_1",
        "cp/overlap",
        "cp/imbalance/zigzag",
        "cp/imbalance/double_zigzag",
        "cp/imbalance/contiguous",
        "cp/exchange/selective",
        "cp/exchange/allgather",
        "cp/exchange/ring",
        *(f"fault/{kind}" for kind in EVENT_KINDS),
        *(f"time/{part}" for part in PARTS),
        *(f"time_max/{part}" for part in PARTS),
    }
    assert set(curves.Tags()["histograms"]) == {
        "routing/selected_chunks/layer_0",
        "routing/selected_chunks/layer_1",
    }
    parts = [part for part in PARTS if part not in ("save", "heat_map")]
    for index in range(1, 19):  # the first and the last step draw maps
        known = sum(curves.Scalars(f"time/{part}")[index].value for part in parts)
        assert known >= 0.999 * curves.Scalars("perf/step_seconds")[index].value
    for layer in (0, 1):
        assert [event.step for event in curves.Images(f"routing/heat_map/layer_{layer}")] == [1, 20]
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


def test_what_context_parallelism_moved_is_there_at_every_step(folder):
    curves = read_curves(folder / "runs" / "whole")
    cp = {
        tag: {event.step: event.value for event in curves.Scalars(tag)}
        for tag in curves.Tags()["scalars"]
        if tag.startswith("cp/")
    }
    # K and V twice and their gradients once, of 2 layers and 2 sequences: 128 tokens of every rank for the other, 2 KV
    # heads of 8 numbers. A zigzag of two needs at most six of the eight chunks.
    dense = 3 * 2 * 2 * (2 * 2 * 128 * 2 * 8 * 4) / 2**30
    for step in range(1, 21):
        sent = cp["cp/sent_gib"][step]
        coverage = (cp["cp/coverage/layer_0"][step] + cp["cp/coverage/layer_1"][step]) / 2
        assert sent == pytest.approx(dense * coverage * 6 / 8)
        assert cp["cp/planned_gib"][step] == sent
        assert cp["cp/dense_gib"][step] == pytest.approx(dense)
        assert cp["cp/slow_link_gib"][step] == 0
        assert 0 <= cp["cp/overlap"][step] <= 1
        for layout in ("zigzag", "contiguous"):
            assert 1 <= cp[f"cp/imbalance/{layout}"][step] < 2  # one rank with all the work
        assert cp["cp/exchange/selective"][step] == 1


def test_without_context_parallelism_it_has_no_curves(folder, of_one_rank):
    assert of_one_rank["first"].summary.completed
    tags = read_curves(folder / "runs" / "short").Tags()["scalars"]
    assert "train/loss" in tags
    assert not [tag for tag in tags if tag.startswith("cp/")]


def test_the_model_learns(folder):
    curve = losses(folder / "runs" / "whole")
    assert curve[1] == pytest.approx(math.log(257), abs=0.1)  # and not of the 320 rows, 5.77
    assert curve[20] < 0.8 * curve[1]


def test_the_resolved_configuration_is_beside_the_run(folder):
    saved = folder / "runs" / "whole" / "config.yaml"
    assert load_config(saved) == load_config(folder / "tiny.yaml", ["run.name=whole", "logging.heat_map_layers=null"])
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


@pytest.fixture(scope="module")
def of_one_rank(folder):
    (outcomes,) = run_ranks(
        "tests.training.training_jobs:runs_of_one_rank", 1, folder / "tiny.yaml", folder, cpu_only=True
    )
    return outcomes


def test_a_finished_run_does_nothing_more(folder, of_one_rank):
    first, again = of_one_rank["first"].summary, of_one_rank["again"].summary
    assert (again.steps, again.completed) == (3, True)
    assert (again.first_loss, again.last_loss) == (first.first_loss, first.last_loss)
    assert list(losses(folder / "runs" / "short")) == [1, 2, 3]
    assert "run short is complete at step 3: set run.name=" in of_one_rank["again"].output
    assert "is complete" not in of_one_rank["first"].output
    assert "tokens/s" in of_one_rank["first"].output
    assert "tokens/s" not in of_one_rank["again"].output


def test_a_resume_into_another_function_says_so(of_one_rank):
    changed = of_one_rank["other function"]
    assert changed.summary.steps == 4
    assert "model.rotary_base was 10000.0 and is 500.0; attention.alpha was 1.5 and is 2.0\n" in changed.output
    assert "not the function" not in of_one_rank["again"].output


def learning_rates(folder, name):
    return [event.value for event in read_curves(folder / "runs" / name).Scalars("train/learning_rate")]


def schedule_events(folder, name):
    events = EventLog(folder / "runs" / name).read()
    return [(event.step, event.message) for event in events if event.kind == "schedule_changed"]


def test_an_extended_run_says_how_its_learning_rate_changes(folder, of_one_rank):
    message = (
        "the learning rate of step 4 is 5.000e-03 instead of 0.000e+00: optimizer.decay_steps (by default "
        "training.steps) was 3 and is 6. To keep the checkpoint's curve, set optimizer.decay_steps=3"
    )
    assert learning_rates(folder, "short") == pytest.approx([5e-3, 1e-2, 0.0])
    assert schedule_events(folder, "short") == []
    assert schedule_events(folder, "extended") == [(3, message)]
    assert f"schedule_changed: {message}" in " ".join(of_one_rank["extended"].output.split())


def test_a_run_extended_with_its_decay_steps_keeps_its_curve(folder, of_one_rank):
    assert learning_rates(folder, "kept") == [0.0, 0.0, 0.0]
    assert schedule_events(folder, "kept") == []
    # Step 7 of "extended" follows six steps of the curve that ends there.
    assert learning_rates(folder, "extended") == pytest.approx([5e-3, 1.464466e-3, 0.0, 0.0])
    assert "schedule_changed" not in of_one_rank["extended again"].output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("never", r"CheckpointError: .*run\.resume=never"),
        ("other model", r"CheckpointError: .*num_layers is 2 in the checkpoint and 4 in this run"),
        ("other data", r"CheckpointError: cannot continue from .*shuffle_seed 0, this run has 7"),
        ("missing data", r"ConfigError: cannot prepare the data: data\.paths: 'no_such_folder'"),
        ("no matplotlib", r"ConfigError: the run cannot start: .*needs matplotlib.*logging\.heat_map_layers=\[\]"),
        ("diverged", r"RunError: step 4: loss nan.*max_skipped_steps = 3.*lower optimizer\.lr"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(of_one_rank, name, message):
    assert re.match(message, of_one_rank[name].error)


def test_a_run_without_heat_maps_needs_no_matplotlib(of_one_rank):
    assert of_one_rank["no maps"].summary.steps == 3


def test_a_loss_that_is_no_number_leaves_no_checkpoint(folder, of_one_rank):
    assert not list((folder / "runs" / "nan").glob("checkpoints/step_*"))


@pytest.fixture(scope="module")
def of_two_ranks(folder):
    """Runs of documents of which one is empty and one no UTF-8."""
    documents = folder / "documents"
    documents.mkdir()
    for index, content in enumerate([b"x" * 300, b"", b"\xff", b"y" * 300]):
        (documents / f"{index}.txt").write_bytes(content)
    return run_ranks("tests.training.training_jobs:runs_of_two_ranks", 2, folder / "tiny.yaml", folder, cpu_only=True)


@pytest.mark.parametrize("layout", ["cp", "dp"])
def test_skipped_documents_are_counted_once_and_shown(folder, of_two_ranks, layout):
    # 2 x 768 + 1 tokens are of six documents of 300 and their ends: two others are skipped in each of three epochs.
    for rank in of_two_ranks:
        assert rank[f"skipping, {layout} 2"].summary.skipped_documents == 2 * 3
    assert "skipped documents" in of_two_ranks[0][f"skipping, {layout} 2"].output
    curve = read_curves(folder / "runs" / f"skipping_{layout}").Scalars("data/skipped_documents")
    assert curve[-1].value == 2 * 3
    (event,) = EventLog(folder / "runs" / f"skipping_{layout}").read()
    assert (event.kind, event.step) == ("data_damaged", 0)
    assert re.search(r"1 of 4 documents are skipped: .*2\.txt: .*can't decode byte 0xff", event.message)


def test_damaged_documents_can_stop_a_run_at_every_rank(folder, of_two_ranks):
    for rank in of_two_ranks:
        error = rank["damaged, stop"].error
        assert re.match(r"ConfigError: cannot prepare the data: .*2\.txt: .*0xff.*data\.damaged=skip", error)
    assert not (folder / "runs" / "damaged_stop").exists()


def test_a_resume_with_shorter_sequences_goes_on_and_says_so(folder, of_two_ranks):
    for rank in of_two_ranks:
        assert rank["shorter sequences"].error == ""
        assert rank["shorter sequences"].summary.steps == 5
    changes = [event for event in EventLog(folder / "runs" / "shorter").read() if event.kind == "data_changed"]
    assert [event.step for event in changes] == [3]
    assert "training.sequence_length was 256 and is 128: continuing with the next unread token" in changes[0].message


def test_padding_between_separate_documents_is_no_token(folder, of_two_ranks):
    # Six sequences of 256 tokens hold documents of 300. The ends among them, 44 to 236 long, are padded to whole
    # chunks of 32 by 20 each.
    for rank in of_two_ranks:
        summary = rank["separate, dp 2"].summary
        assert summary.tokens == 2 * (768 - 40)
        assert summary.padding == pytest.approx(40 / 768)
        assert rank["skipping, dp 2"].summary.padding == 0
    curve = read_curves(folder / "runs" / "separate_dp").Scalars("data/padding")
    assert [event.value for event in curve] == pytest.approx([20 / 512, 40 / 512, 20 / 512])
    assert re.search(r"padding +5\.2% of the tokens computed", of_two_ranks[0]["separate, dp 2"].output)
    assert "of the tokens computed" not in of_two_ranks[0]["skipping, dp 2"].output


def test_separate_documents_give_the_same_run_under_context_parallelism(folder, of_two_ranks):
    for rank in of_two_ranks:
        dp, cp = (rank[f"separate, {layout} 2"].summary for layout in ("dp", "cp"))
        assert (cp.tokens, cp.padding) == (dp.tokens, dp.padding)
    expected = losses(folder / "runs" / "separate_dp")
    assert losses(folder / "runs" / "separate_cp") == pytest.approx(expected, rel=2e-5)


def test_triton_without_a_gpu_is_refused_at_every_rank(of_two_ranks):
    for rank in of_two_ranks:
        assert re.match(r"ConfigError: .*attention\.backend=triton needs a CUDA GPU", rank["triton"].error)


def test_data_that_one_rank_cannot_read_ends_all_with_the_reason(of_two_ranks):
    zero, one = of_two_ranks
    assert zero["unreachable"].error == "RunError: cannot read the data: Unreachable: the hub does not answer"
    assert one["unreachable"].error == "Unreachable: the hub does not answer"


def test_the_command_line_reports_a_wrong_world_size_at_one_rank_only(folder):
    arguments = ["-m", "dash_dist.cli", "train", str(folder / "tiny.yaml"), "parallel.context=4"]
    results = run_rank_processes(arguments, 2)
    assert [status for status, _ in results] == [2, 2], results
    assert "world size 2 is not a multiple" in results[0][1]
    assert "Traceback" not in results[0][1]
    assert "error:" not in results[1][1]

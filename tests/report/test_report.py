"""What the report reads, what it makes of it, and what it says where there is nothing to read."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from dash_dist.engine.routing import LayerRouting
from dash_dist.errors import RunError
from dash_dist.report import write_report
from dash_dist.report.figures import COLOURS, figures
from dash_dist.report.health import GRACE_SECONDS, remarks, verdict
from dash_dist.report.record import MAX_POINTS, Curve, RunRecord, read_run
from dash_dist.run.events import Event, EventLog
from dash_dist.run.profile import PartTime, Profile
from dash_dist.training.telemetry.metrics import MetricsWriter


def write_curves(run: Path, curves: dict[str, list[tuple[int, float]]], *, purge_step: int | None = None) -> None:
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=purge_step)
    for tag, points in curves.items():
        for step, value in points:
            writer.add_scalar(tag, value, step)
    writer.close()


def new_run(folder: Path, *, steps: int = 10) -> Path:
    run = folder / "runs" / "it"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"training": {"steps": steps}, "attention": {"layout": "zigzag"}}))
    return run


def curve(*values: float) -> Curve:
    return Curve(np.arange(1, len(values) + 1), np.array(values), np.arange(len(values)) * 2.0)


HEALTHY = RunRecord(
    directory=Path("runs/it"),
    config_text="",
    config={"training": {"steps": 100}, "attention": {"layout": "zigzag"}},
    curves={
        "train/loss": curve(*np.linspace(5, 2, 40)),
        "train/tokens": curve(*np.linspace(100, 4000, 40)),
        **{f"time/{part}": curve(*[seconds] * 40) for part, seconds in (("forward", 1.0), ("backward", 2.0))},
        "time/data": curve(*[0.01] * 40),
        "time/save": curve(*[0.1] * 40),
        "time/rest": curve(*[0.3] * 40),
        "time_max/forward": curve(*[1.1] * 40),
        "time_max/backward": curve(*[2.2] * 40),
        "cp/planned_gib": curve(*[1.0] * 40),
        "cp/sent_gib": curve(*[1.0] * 40),
        "cp/overlap": curve(*[0.95] * 40),
        "cp/imbalance/zigzag": curve(*[1.05] * 40),
        "cp/imbalance/contiguous": curve(*[1.5] * 40),
        "routing/mean_density": curve(1.0, 0.5, 0.2, 0.1),
    },
    histograms={},
    pictures={},
    events=[],
    checkpoints=[],
    profile=None,
    ended=None,
    last_write=1000.0,
    read_at=1010.0,
)


def test_buckets_of_the_held_out_loss_are_in_the_order_of_their_positions() -> None:
    named = ("8192-16384", "0-4096", "16384-20000", "4096-8192")
    held_out = {"heldout/loss": curve(2.0), **{f"heldout/loss/{name}": curve(1.0) for name in named}}
    shown = {
        figure.name: figure for figure in figures(dataclasses.replace(HEALTHY, curves={**HEALTHY.curves, **held_out}))
    }
    assert shown["heldout"].title == "Held-out loss"
    last = shown["heldout-by-position"].description
    assert last.endswith("last: 0-4096 1, 4096-8192 1, 8192-16384 1, 16384-20000 1.")


def test_a_healthy_run_has_no_remarks() -> None:
    assert remarks(HEALTHY) == []
    assert verdict(HEALTHY) == "running"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train/loss": curve(5, 4, float("nan"), float("inf"), 3)}, "loss not finite in 2 logged steps"),
        ({"train/loss": curve(*np.linspace(2, 5, 40))}, "the loss rose, from 2.115 to 4.885"),
        ({"time/data": curve(0.5)}, "reading data takes 13% of a step"),
        ({"time/save": curve(0.5)}, "checkpoints hold training up by 15%"),
        ({"time/rest": curve(2.0)}, "40% of a step is waiting"),
        ({"time_max/backward": curve(4.0)}, "the slowest rank computes 1.70 times"),
        ({"cp/overlap": curve(0.4)}, "overlap low: 40%"),
        ({"cp/sent_gib": curve(2.0)}, "2 GiB were sent where 1 GiB were planned"),
        ({"cp/imbalance/zigzag": curve(1.8)}, "1.80 times the attention of the mean one"),
        ({"routing/mean_density": curve(0.99)}, "routing selects 99% of the chunks"),
    ],
)
def test_what_is_unusual_is_remarked_and_nothing_else(changes: dict[str, Curve], message: str) -> None:
    (remark,) = remarks(dataclasses.replace(HEALTHY, curves={**HEALTHY.curves, **changes}))
    assert message in remark.text
    if "imbalance" in next(iter(changes)):
        assert remark.advice == "attention.layout=contiguous would make it 1.50"


def test_events_are_counted() -> None:
    events = [Event(0.0, "restart", 1, ""), Event(1.0, "restart", 2, ""), Event(2.0, "hang", 2, "")]
    found = [remark.text for remark in remarks(dataclasses.replace(HEALTHY, events=events))]
    assert found == ["2 restarts", "1 hang"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ended": "finished"}, "finished"),
        ({"ended": "stopped"}, "stopped"),
        ({"ended": "error"}, "failed"),
        ({"config": {"training": {"steps": 40}}}, "finished"),
        ({"read_at": 1000.0 + GRACE_SECONDS + 9}, "running"),  # five intervals of two seconds
        ({"read_at": 1000.0 + GRACE_SECONDS + 11}, "interrupted"),
        ({"curves": {}}, "running"),
        ({"curves": {}, "read_at": 1000.0 + GRACE_SECONDS + 1}, "not started"),
    ],
)
def test_the_verdict(changes: dict[str, object], expected: str) -> None:
    assert verdict(dataclasses.replace(HEALTHY, **changes)) == expected  # type: ignore[arg-type]


def test_what_a_resumed_run_took_back_is_left_out(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_curves(run, {"train/loss": [(step, 5.0) for step in (1, 2, 3, 4)]})
    write_curves(run, {"train/loss": [(3, 2.0)]}, purge_step=3)
    loss = read_run(run).curves["train/loss"]
    assert (loss.steps.tolist(), loss.values.tolist()) == ([1, 2, 3], [5.0, 5.0, 2.0])


def test_of_long_curves_a_sample_with_the_end_is_kept(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_curves(run, {"train/loss": [(step, float(step)) for step in range(3 * MAX_POINTS)]})
    loss = read_run(run).curves["train/loss"]
    assert len(loss.steps) == MAX_POINTS
    assert loss.last == 3 * MAX_POINTS - 1
    assert (np.diff(loss.steps) > 0).all()


def test_histograms_and_layers_are_read_in_order(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    writer = MetricsWriter(run / "tensorboard", start_step=0)
    selected = torch.tensor([0, 10, 0, 30])
    writer.routing(5, [LayerRouting(layer=layer, density=0.5, selected=selected) for layer in range(11)])
    writer.close()
    record = read_run(run)
    assert list(record.with_prefix("routing/density")) == [f"layer_{layer}" for layer in range(11)]
    assert record.histograms["routing/selected_chunks/layer_10"].counts[[1, 2, 3]].tolist() == [10, 0, 30]
    (boxes,) = (figure for figure in figures(record) if figure.name == "selected-chunks")
    assert "layer 1: 3 of 5 % to 95 % 1 to 3" in boxes.description


def test_parts_that_were_not_logged_at_a_step_are_nothing_there() -> None:
    """A map was drawn at one step of forty: the others must not be shown as if they had one."""
    steps = Curve(np.array([1]), np.array([50.0]), np.array([0.0]))
    (stacked,) = (
        figure
        for figure in figures(dataclasses.replace(HEALTHY, curves={**HEALTHY.curves, "time/heat_map": steps}))
        if figure.name == "time"
    )
    assert "heat map" in stacked.svg
    assert stacked.svg.count("<path") > 5
    assert all(colour in stacked.svg for colour in COLOURS[:6])


def test_a_run_that_logged_nothing_has_a_page_that_says_so(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    text = write_report(run).read_text()
    assert "Nothing was logged yet" in text
    assert "<figure" not in text
    EventLog(run).append("hang", "rank 1 <silent>", step=None)
    text = write_report(run).read_text()
    assert "rank 1 &lt;silent&gt;" in text


def test_a_damaged_event_file_and_an_old_run_do_not_matter(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_curves(run, {"train/loss": [(1, 5.0), (2, 4.0)]})
    (file,) = (run / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # cut short, as by a kill
    (run / "attempt.json").write_text("{")
    old = time.time() - 10_000
    for path in [*run.iterdir(), *(run / "tensorboard").iterdir()]:
        os.utime(path, (old, old))
    record = read_run(run)
    assert record.curves["train/loss"].steps.tolist() == [1]
    assert verdict(record) == "interrupted"


@pytest.mark.parametrize("text", ["training: 3", "training: {steps: soon}\nlogging: []", "- a list", "# nothing"])
def test_an_edited_configuration_does_not_matter(tmp_path: Path, text: str) -> None:
    run = new_run(tmp_path)
    write_curves(run, {"train/loss": [(1, 5.0), (2, 4.0)]})
    (run / "config.yaml").write_text(text)
    assert "loss, first and last" in write_report(run).read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "is not a folder: name the folder of a run, such as runs/demo"),
        (lambda folder: folder, "is not the folder of a run, it has no config.yaml and no tensorboard/"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(RunError, match=message):
        write_report(make(tmp_path))


def test_the_command_says_where_the_page_is_and_what_is_wrong(tmp_path: Path) -> None:
    run = new_run(tmp_path)

    def report(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dash_dist.cli", "report", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    done = report(str(run), "--output", str(tmp_path / "a" / "b.html"))
    assert done.stdout.strip() == str(tmp_path / "a" / "b.html")
    assert (tmp_path / "a" / "b.html").read_text().endswith("</html>\n")
    refused = report(str(tmp_path))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


PROFILE = Profile(
    run="it",
    stage="64k",
    layout="2 x <GPU>",
    device="H200",
    ranks=2,
    steps=5,
    step_seconds=0.09,
    profiled_seconds=0.1,
    gap_seconds=0.025,
    gap_seconds_max=0.03,
    tokens_per_second_per_gpu=1234.0,
    model_tflops_per_gpu=400.0,
    mfu=0.4,
    density=0.05,
    memory={"allocated_peak_gib": 70.0},
    parts=[
        PartTime("matmul", "matrix products", 0.06, 0.07, 0.061, 320.0, 650e12, None, 0.657, {"nvjet": 0.061}),
        PartTime("norm", "norms", 0.015, 0.016, 0.015, 64.0, None, 3.2e12, None, {}),
    ],
    traces=["trace_rank_00000.json.gz", "trace_rank_00001.json.gz"],
)


def test_the_profile_of_a_run_is_a_table_even_before_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "it" / "profile"
    folder.mkdir(parents=True)
    with pytest.raises(RunError, match="is not the folder of a run"):
        write_report(tmp_path / "it")
    PROFILE.write(folder)
    assert read_run(tmp_path / "it").profile == PROFILE
    page = write_report(tmp_path / "it").read_text()
    for text in (
        "A step's anatomy",
        "5 steps on 2 x &lt;GPU&gt;, stage 64k, H200",
        "<dd>40.0%</dd>",
        "<dd>70.00 GiB</dd>",
    ):
        assert text in page
    rows = [
        ["matrix products", "60.00", "70.00", "60.0%", "61.00", "320", "650 TFLOP/s", "66%"],
        ["norms", "15.00", "16.00", "15.0%", "15.00", "64", "3,200 GB/s", ""],
        ["gaps: elsewhere", "25.00", "30.00", "25.0%", "", "", "", ""],
        ["step", "100.00", "100.00", "100.0%", "", "", "", ""],
    ]
    for row in rows:
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in page
    (folder / "profile.json").write_text("{}")
    with pytest.raises(RunError, match=r"profile\.json is not a profile of this version.*profile the run again"):
        write_report(tmp_path / "it")

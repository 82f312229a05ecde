import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dash_dist.run.messages import RunStart, RunSummary, StepReport
from dash_dist.training.console import ConsoleProgress

START = RunStart(
    name="demo", layout="2 x cpu", start_step=10, steps=40, tokens_per_step=8192, resumed_from=Path("/r/step_00000010")
)
REPORT = StepReport(step=20, steps=40, loss=2.5, tokens_per_second=1234.5, density=0.25, eta_seconds=61.0)
SUMMARY = RunSummary(
    steps=40,
    completed=True,
    first_loss=5.5,
    last_loss=2.25,
    tokens=327_680,
    tokens_per_second=1300.0,
    tensorboard_directory=Path("/r/" + "long/" * 30 + "tensorboard"),
    checkpoint_directory=Path("/r/checkpoints"),
    density={0: 0.5, 1: 0.125},
)


def shown(*, terminal: bool, summary: RunSummary = SUMMARY) -> str:
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, force_terminal=terminal, width=100, highlight=False))
    progress.start(START)
    progress.update(REPORT)
    progress.finish(summary)
    return out.getvalue()


def test_without_a_terminal_each_report_is_one_plain_line():
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "run demo: 2 x cpu, 8,192 tokens a step"
    assert lines[1] == "resumed from /r/step_00000010 at step 10"
    assert lines[2] == "step 20/40  loss 2.5000  1,234 tokens/s  density 0.250  eta 1:01"


def test_on_a_terminal_there_is_a_live_line():
    text = shown(terminal=True)
    assert "\x1b[" in text
    assert "20/40" in text
    assert "loss 2.5000  1,234 tokens/s  density 0.250  eta 1:01" in text


def summary_rows(text: str) -> dict[str, str]:
    return {line[:18].strip(): line[18:].strip() for line in text.splitlines()[4:]}


def test_the_summary_tells_all():
    text = shown(terminal=False)
    rows = summary_rows(text)
    assert "skipped documents" not in rows
    assert rows["first loss"] == "5.5000"
    assert rows["last loss"] == "2.2500"
    assert rows["tokens/s"] == "1,300"
    assert rows["density, layer 0"] == "0.500"
    assert rows["density, layer 1"] == "0.125"
    assert rows["checkpoints"] == "/r/checkpoints"
    assert str(SUMMARY.tensorboard_directory) in "".join(line.strip() for line in text.splitlines())


def test_the_summary_of_no_step_has_no_speed_and_skipped_documents_are_told():
    rows = summary_rows(shown(terminal=False, summary=replace(SUMMARY, tokens_per_second=0.0, skipped_documents=12)))
    assert "tokens/s" not in rows
    assert rows["skipped documents"] == "12 without text, damaged or too long"

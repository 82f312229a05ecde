"""What a person sees of a run: a live line on a terminal, a plain line per logging interval elsewhere, the summary.

Knows how to show a run that is told to it; does not know where the numbers come from, nor in which process they arose.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table


@dataclass(frozen=True)
class RunStart:
    """What is known before the first step.

    `layout` says the parallel layout in words; `start_step` counts the steps done before, `tokens_per_step` the tokens
    of a global batch, padding included.
    """

    name: str
    layout: str
    start_step: int
    steps: int
    tokens_per_step: int
    resumed_from: Path | None


@dataclass(frozen=True)
class StepReport:
    """One logging interval. `density` is the mean over the layers, None until it was first recorded."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    density: float | None
    eta_seconds: float


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        steps: optimizer steps the run has done, those before a resume included.
        completed: False if the run was asked to stop before its last step.
        first_loss, last_loss: mean loss per token in nats at step 1 and at the last step; None for no step at all.
        tokens: tokens of all global batches so far, each counted once, padding left out.
        tokens_per_second: of all ranks together, since this process started; 0.0 if it ran no step.
        density: per layer (0-based), the last recorded share of causally available chunks that were selected; empty if
            this process ran no step.
        skipped_documents: empty and undecodable ones passed over so far, at all ranks.
        padding: share of the tokens of all global batches so far that are padding.
        tensorboard_directory, checkpoint_directory: where the run's curves and checkpoints are.
    """

    steps: int
    completed: bool
    first_loss: float | None
    last_loss: float | None
    tokens: int
    tokens_per_second: float
    tensorboard_directory: Path
    checkpoint_directory: Path
    density: Mapping[int, float] = field(default_factory=dict)
    skipped_documents: int = 0
    padding: float = 0.0


class ProgressReporter(Protocol):
    """Whoever is told how the run goes; called at rank 0 only."""

    def start(self, run: RunStart) -> None: ...

    def update(self, report: StepReport) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, summary: RunSummary) -> None: ...

    def close(self) -> None: ...


class ConsoleProgress:
    """Shows a run on the console of this process."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._live: Progress | None = None
        self._task = TaskID(0)

    def start(self, run: RunStart) -> None:
        self._print(f"run {run.name}: {run.layout}, {run.tokens_per_step:,} tokens a step")
        if run.resumed_from is not None:
            self._print(f"resumed from {run.resumed_from} at step {run.start_step}")
        if self._console.is_terminal:
            self.close()
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._live.add_task("first step ...", total=run.steps, completed=run.start_step)
            self._live.start()

    def update(self, report: StepReport) -> None:
        line = _numbers(report)
        if self._live is not None:
            self._live.update(self._task, completed=report.step, description=line)
        else:
            self._print(f"step {report.step}/{report.steps}  {line}")

    def note(self, text: str) -> None:
        self._print(text)

    def finish(self, summary: RunSummary) -> None:
        self.close()
        state = "finished" if summary.completed else "stopped on request; the same command goes on from here"
        self._print(f"{state}, step {summary.steps}")
        self._console.print(_summary_table(summary))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        # soft_wrap: a line that is read by a program or a log must not be broken at the console's width.
        self._console.print(text, soft_wrap=True, markup=False)


class Pace:
    """Tokens per second and time left, from the steps of this process; the first is left out as a warm-up."""

    def __init__(self, start_step: int, steps: int) -> None:
        self._step, self._steps = start_step, steps
        self._seconds = 0.0
        self._tokens = 0
        self._counted = 0
        self._first: tuple[float, int] | None = None
        self._last = time.perf_counter()

    def step(self, tokens: int) -> float:
        """Count one step of `tokens` tokens that ended now; returns its seconds since the step before."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._step += 1
        if self._first is None:
            self._first = (seconds, tokens)
        else:
            self._seconds += seconds
            self._tokens += tokens
            self._counted += 1
        return seconds

    def leave_out_since_step(self) -> None:
        """Do not count what was done since the last step, such as logging."""
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        """Do not count the time of the body."""
        start = time.perf_counter()
        yield
        self._last += time.perf_counter() - start

    def go_to(self, step: int) -> None:
        """Go on from `step` without counting how it was reached."""
        self._step = step
        self.leave_out_since_step()

    @property
    def tokens_per_second(self) -> float:
        """Mean over the counted steps; the first alone until there is another; 0.0 before any."""
        if self._counted:
            return self._tokens / self._seconds
        return self._first[1] / self._first[0] if self._first else 0.0

    @property
    def eta_seconds(self) -> float:
        """Time the steps left will take at this pace, in seconds."""
        per_step = self._seconds / self._counted if self._counted else (self._first or (0.0, 0))[0]
        return per_step * (self._steps - self._step)


def _numbers(report: StepReport) -> str:
    density = "-" if report.density is None else f"{report.density:.3f}"
    minutes, seconds = divmod(round(report.eta_seconds), 60)
    return (
        f"loss {report.loss:.4f}  {report.tokens_per_second:,.0f} tokens/s  density {density}  "
        f"eta {minutes}:{seconds:02d}"
    )


def _summary_table(summary: RunSummary) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, loss in (("first loss", summary.first_loss), ("last loss", summary.last_loss)):
        table.add_row(name, "-" if loss is None else f"{loss:.4f}")
    table.add_row("tokens", f"{summary.tokens:,}")
    if summary.tokens_per_second:
        table.add_row("tokens/s", f"{summary.tokens_per_second:,.0f}")
    for layer, density in summary.density.items():
        table.add_row(f"density, layer {layer}", f"{density:.3f}")
    if summary.skipped_documents:
        table.add_row("skipped documents", f"{summary.skipped_documents:,} empty or not UTF-8")
    if summary.padding:
        table.add_row("padding", f"{summary.padding:.1%} of the tokens computed")
    table.add_row("TensorBoard", str(summary.tensorboard_directory))
    table.add_row("checkpoints", str(summary.checkpoint_directory))
    return table

"""Progress of a run on a console: a live line on a terminal, plain lines elsewhere, a summary at the end.

Knows how to show messages; does not know the source of the numbers.
"""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from dash_dist.run.messages import RunStart, RunSummary, StepReport


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
        state = "finished" if summary.completed else "stopped on request; the same command continues from here"
        self._print(f"{state}, step {summary.steps}")
        self._console.print(_summary_table(summary))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        # soft_wrap: programs and logs need whole lines, not lines broken at the console's width.
        self._console.print(text, soft_wrap=True, markup=False)


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
        table.add_row("skipped documents", f"{summary.skipped_documents:,} without text, damaged or too long")
    if summary.padding:
        table.add_row("padding", f"{summary.padding:.1%} of the tokens computed")
    table.add_row("TensorBoard", str(summary.tensorboard_directory))
    table.add_row("checkpoints", str(summary.checkpoint_directory))
    return table

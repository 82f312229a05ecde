"""The study's commands: train and test models, print tables of the results, draw them.

    python -m tools.study run --part recall --seconds 540
    python -m tools.study table
    python -m tools.study plot

Knows options; does not know how a model is measured.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from dash_dist.errors import RunError
from dash_dist.extras import require_extra
from tools.benchmarks.common.environment import ROOT, describe_environment
from tools.study.cells import identity_of, measure
from tools.study.deadline import Deadline
from tools.study.jobs import Outcome, run_jobs, visible_gpus
from tools.study.parts import Part, cells, parts
from tools.study.results import OtherSettings, Results
from tools.study.sizes import SIZES, Size
from tools.study.table import as_markdown

_PROGRAM = "tools.study"
_OUT = ROOT / "docs" / "results" / "study"

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Compare kinds of attention on the same data.")

Out = Annotated[Path, typer.Option(help="Folder of the results.")]


@app.command()
def run(
    out: Out = _OUT,
    folder: Annotated[Path, typer.Option(help="Folder for texts, tokens and runs.")] = Path("build/study"),
    size: Annotated[str, typer.Option(help="gpu, or cpu to try the program out.")] = "gpu",
    part: Annotated[list[str], typer.Option(help="Part of the study; may be repeated. Default: all.")] = [],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="Method; may be repeated. Default: those of the part.")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Models of each method, from seed 0 on.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Models at a time on each GPU; times are then not compared.")] = 1,
    seconds: Annotated[float | None, typer.Option(help="Limit; the same command goes on from there.")] = None,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Train and test the models that have no result yet. Each result is written when it is there."""
    deadline = Deadline(seconds)
    if size not in SIZES:
        raise typer.BadParameter(f"--size {size}: give one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    chosen = _chosen(part, method, sizes)
    results, folder = Results(out), folder.absolute()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = describe_environment(_PROGRAM, sys.argv[1:], commit=commit, device=device)
    asked = list(cells(chosen, seeds, tuple(method)))
    identities = {cell: identity_of(cell, size, sizes) for cell in asked}
    try:
        missing = [cell for cell in asked if not results.has(cell, identities[cell])]
    except OtherSettings as error:
        raise typer.BadParameter(str(error)) from None
    done, failed, logs, gpus = len(asked) - len(missing), list[str](), folder / "logs", visible_gpus()

    def ended(outcome: Outcome) -> None:
        nonlocal done
        cell, after = outcome.cell, f"after {outcome.seconds:.0f} s"
        if outcome.record is not None:
            path = results.write(cell, {**identities[cell], "environment": environment, **outcome.record})
            done += 1
            print(f"-- {path}: {done} of {len(asked)}, {after}", flush=True)
        elif outcome.error is not None:
            failed.append(f"{cell.title}: {outcome.error} ({after}, log {outcome.log})")
            print(failed[-1], flush=True)

    sharing = min(jobs, math.ceil(len(missing) / len(gpus)))
    work = functools.partial(measure, size=sizes, folder=folder, deadline=deadline, jobs=sharing)
    print(f"{len(missing)} models to train, {jobs} at a time on each GPU; {logs} has their output", flush=True)
    run_jobs(missing, work, ended, gpus=gpus, per_gpu=jobs, logs=logs, deadline=deadline)
    print("\n".join([f"{done} of {len(asked)} results are there", *failed]))
    if failed:
        raise typer.Exit(1)


@app.command()
def table(out: Out = _OUT) -> None:
    """Print the results as tables, mean and spread over the seeds."""
    with _as_message():
        print(as_markdown(list(Results(out))), end="")


@app.command()
def plot(out: Out = _OUT) -> None:
    """Draw the results of each part into OUT/PART.png."""
    with _as_message():
        require_extra("report", "plot")  # machines with GPUs may lack it
        from tools.study.plot import plot_parts

        for path in plot_parts(out, list(Results(out))):
            print(path)


@contextlib.contextmanager
def _as_message() -> Iterator[None]:
    """Show what a user can mend without a traceback."""
    try:
        yield
    except (ValueError, RunError) as error:
        raise typer.BadParameter(str(error)) from None


def _chosen(names: list[str], only: list[str], size: Size) -> list[Part]:
    known = parts(size)
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"--part {unknown[0]}: give one of {', '.join(known)}")
    chosen = [known[name] for name in names or known]
    of_parts = {method for one in chosen for method in one.methods}
    if strange := [name for name in only if name not in of_parts]:
        raise typer.BadParameter(f"--method {strange[0]}: give one of {', '.join(sorted(of_parts))}")
    return chosen


if __name__ == "__main__":
    app()

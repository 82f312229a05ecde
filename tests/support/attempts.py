"""Runs that train in a rank's own Python, with the summary, error and output of each.

The test process itself does not import this: it would load Megatron-core.
"""

import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dash_dist.config.file import load_config
from dash_dist.run.messages import RunSummary
from dash_dist.run.requests import Requests, nothing_asked
from dash_dist.training.console import ConsoleProgress
from dash_dist.training.run import train


@dataclass(frozen=True)
class Outcome:
    """Result of one call of `train`: its summary or its error, and its printed output."""

    summary: RunSummary | None
    error: str
    output: str


def attempt(config: Path, *overrides: str, requests: Requests = nothing_asked) -> Outcome:
    out = io.StringIO()
    summary, failure = None, ""
    try:
        reporter = ConsoleProgress(Console(file=out, width=200, highlight=False))
        summary = train(load_config(config, overrides), reporter=reporter, requests=requests)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return Outcome(summary, failure, out.getvalue())


def attempts(config: Path, runs: list[list[str]]) -> list[Outcome]:
    return [attempt(config, *overrides) for overrides in runs]

"""What a rank does for the fuzz of configurations: one run after another. Not imported by the tests themselves."""

import io
import traceback
from pathlib import Path

from rich.console import Console

from dash_dist.config.file import load_config
from dash_dist.run.messages import RunSummary
from dash_dist.training.console import ConsoleProgress
from dash_dist.training.run import train


def train_each(configs: list[Path]) -> list[tuple[RunSummary | None, str]]:
    """(summary, traceback) of each run; one of them is empty."""
    results: list[tuple[RunSummary | None, str]] = []
    for config in configs:
        try:
            reporter = ConsoleProgress(Console(file=io.StringIO(), highlight=False))
            results.append((train(load_config(config), reporter=reporter), ""))
        except Exception:
            results.append((None, traceback.format_exc()))
    return results

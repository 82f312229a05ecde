"""Arguments that several commands share, and the exit status of a command.

Knows typer and exit statuses; does not know individual commands.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/demo.yaml.")]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace those of the file, such as training.steps=20."
    ),
]


def run_app(command: typer.Typer) -> None:
    """Run a typer command and end the process. A RunError is printed once, without a traceback.

    Exit status: 2 for a refused configuration or command line, 1 for a failed run.
    """
    try:
        command()
    except Exception as error:
        from dash_dist.errors import ConfigError, RankError, RunError

        if not isinstance(error, RunError):
            raise
        # Such an error is raised at every rank; one of them says it. A rank that failed alone has said so.
        if not isinstance(error, RankError) and os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)

"""Arguments that several commands share, and the exit status of a command.

Knows typer and exit statuses; does not know individual commands.
"""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/demo.yaml.")]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace those of the file, such as training.steps=20."
    ),
]


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values at a time: `--length 16K 64K`.

    The values end at the next option, or at a KEY=VALUE.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for one in self.params if getattr(one, "multiple", False) for name in one.opts}
        return super().parse_args(ctx, list(_one_by_one(args, repeatable)))


def _one_by_one(arguments: Sequence[str], repeatable: Collection[str]) -> Iterator[str]:
    option = ""
    for argument in arguments:
        is_value = not argument.startswith("-") and "=" not in argument
        if argument in repeatable:
            option = argument
        elif option and is_value:
            yield option
            yield argument
        else:
            option = ""
            yield argument


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

"""The `dash-dist` command: `train` and `config`.

Knows how a person calls and how an error is shown; does not know what a run consists of. Imports of torch and
of the training code wait until a command needs them, so that `--help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models on very long sequences with context-parallel DashAttention.",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace those of the file, such as training.steps=20."
    ),
]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train in this process, or as one rank where torchrun or DeepSpeed started several."""
    from dash_dist.training import load_config
    from dash_dist.training import train as train_run

    train_run(load_config(config, overrides or []))


@app.command("config")
def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a configuration and print it with every default filled in."""
    from dash_dist.training import load_config
    from dash_dist.training.config_file import to_yaml

    sys.stdout.write(to_yaml(load_config(config, overrides or [])))


def run_app(command: typer.Typer) -> None:
    """Run a typer command and end the process; a RunError is printed as it is, once, and not as a traceback.

    Exit status: 2 for a refused configuration or command line, 1 for a run that failed.
    """
    try:
        command()
    except Exception as error:
        from dash_dist.training.errors import ConfigError, RunError

        if not isinstance(error, RunError):
            raise
        # Such an error is raised at every rank; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def main() -> None:
    """Entry point of `dash-dist`."""
    run_app(app)


if __name__ == "__main__":
    main()

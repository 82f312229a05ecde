"""`python -m dash_dist.cluster CONFIG [key=value ...]`: the command that runs in a Ray job, and on one machine.

Knows the command line; does not know what the options do.
"""

import typer

from dash_dist.cluster.environment import prepare
from dash_dist.cluster.limits import (
    AnswerTimeout,
    GrowInterval,
    Limits,
    MaxFailures,
    MinWorkers,
    NodeWait,
    NumWorkers,
    StartTimeout,
)
from dash_dist.command_line import ConfigFile, Overrides, run_app


def ray_train(
    config: ConfigFile,
    overrides: Overrides = None,
    num_workers: NumWorkers = None,
    min_workers: MinWorkers = None,
    max_failures: MaxFailures = Limits.max_failures,
    node_wait_seconds: NodeWait = Limits.node_wait_seconds,
    start_timeout_seconds: StartTimeout = Limits.start_timeout_seconds,
    answer_timeout_seconds: AnswerTimeout = Limits.answer_timeout_seconds,
    grow_interval_seconds: GrowInterval = Limits.grow_interval_seconds,
) -> None:
    """Train on Ray: on this machine, or on the cluster that RAY_ADDRESS names."""
    prepare()
    from dash_dist.cluster.launch import launch
    from dash_dist.config.file import load_config

    limits = Limits(
        num_workers=num_workers,
        min_workers=min_workers,
        max_failures=max_failures,
        node_wait_seconds=node_wait_seconds,
        start_timeout_seconds=start_timeout_seconds,
        answer_timeout_seconds=answer_timeout_seconds,
        grow_interval_seconds=grow_interval_seconds,
    )
    launch(load_config(config, overrides or []), limits)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(ray_train)


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()

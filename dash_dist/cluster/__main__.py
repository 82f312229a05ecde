"""`python -m dash_dist.cluster CONFIG [key=value ...]`: the command that runs in a Ray job, and on one machine.

Knows the command line; does not know what the options do.
"""

from typing import Annotated

import typer

from dash_dist.cli import ConfigFile, Overrides, run_app
from dash_dist.cluster.environment import prepare
from dash_dist.cluster.supervisor import Limits

NumWorkers = Annotated[
    int | None,
    typer.Option(
        min=1, help="The most processes. Default: as many of the GPUs as the run can use, or tp x cp x pp on CPUs."
    ),
]
MinWorkers = Annotated[
    int | None,
    typer.Option(min=1, help="The fewest processes to go on with when nodes are lost. Default: tp x cp x pp."),
]
MaxFailures = Annotated[
    int,
    typer.Option(
        min=0, help="Failures in a row, without a new checkpoint in between, after which the run starts again."
    ),
]
NodeWait = Annotated[
    float, typer.Option(min=0, help="How long to wait for lost nodes before going on with fewer processes.")
]
StartTimeout = Annotated[
    float, typer.Option(min=1, help="Limit for placing the processes, for starting them and for their meeting, each.")
]
AnswerTimeout = Annotated[
    float, typer.Option(min=1, help="A process that has not answered for this long is lost, and all start again.")
]
GrowInterval = Annotated[
    float, typer.Option(min=0, help="Run at least this long with fewer processes before nodes that came back are used.")
]


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
    from dash_dist.training import load_config

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


def main() -> None:
    """Entry point."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(ray_train)
    run_app(command)


if __name__ == "__main__":
    main()

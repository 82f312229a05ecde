"""Limits of a run's supervisor, and their command-line options.

Knows the options and their defaults; imports nothing that a `--help` would have to wait for.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Self

import typer

NumWorkers = Annotated[
    int | None,
    typer.Option(
        min=1, help="The most processes. Default: as many of the GPUs as the run can use, or tp x cp x pp on CPUs."
    ),
]
MinWorkers = Annotated[
    int | None,
    typer.Option(min=1, help="The fewest processes to continue with when nodes are lost. Default: tp x cp x pp."),
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


@dataclass(frozen=True)
class Limits:
    """Limits of the supervisor.

    Attributes:
        num_workers: the most workers; None: as many as the cluster has room for and the run can use.
        min_workers: the fewest; None: one replica of the model.
        max_failures: attempts in a row that may fail without a new checkpoint; 0: a failure ends the run.
        node_wait_seconds: how long to wait for lost nodes before going on with fewer workers.
        start_timeout_seconds: for placing the workers, for starting their processes, and for their meeting, each.
        answer_timeout_seconds: a worker that has not answered for this long is lost.
        grow_interval_seconds: least duration of an attempt with fewer workers than there could be.
    """

    num_workers: int | None = None
    min_workers: int | None = None
    max_failures: int = 3
    node_wait_seconds: float = 60.0
    start_timeout_seconds: float = 300.0
    answer_timeout_seconds: float = 120.0
    grow_interval_seconds: float = 600.0

    def with_num_workers(self, num_workers: int) -> Self:
        """These limits, with the most workers set."""
        return replace(self, num_workers=num_workers)

    def arguments(self) -> list[str]:
        """The command-line options that make these limits; what is as by default is left out."""
        return [
            argument
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
            for argument in (f"--{field.name.replace('_', '-')}", str(value))
        ]

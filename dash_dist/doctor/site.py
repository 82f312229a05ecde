"""Subject of an examination by the doctor."""

from dataclasses import dataclass
from pathlib import Path

from dash_dist.config.run import RunConfig


@dataclass(frozen=True)
class Site:
    """A machine or cluster, and the run that is meant for it.

    Attributes:
        ranks: processes of the checks that need several.
        gpus: CUDA devices of this machine that PyTorch can use.
        directory: where runs are to be kept.
        address: the dashboard of a Ray cluster, such as http://head:8265; None for this machine alone.
        config: the run; None where none was named, or where it was refused.
    """

    ranks: int
    gpus: int
    directory: Path
    address: str | None = None
    config: RunConfig | None = None

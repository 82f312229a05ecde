"""Options of the command `dash-dist evaluate`.

Knows how an impossible one is named; does not know runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dash_dist.errors import ConfigError
from dash_dist.evaluation.suites import SUITES
from dash_dist.extras import require_extra

_UNITS = {"": 1, "K": 2**10, "M": 2**20}


@dataclass(frozen=True)
class Options:
    """Options of the command line. Raises ConfigError that names an impossible one.

    Attributes:
        lengths: tokens of the samples, such as "16K"; none stands for the length of training.
        suite: key of `SUITES`.
        routing_scales: none stands for the trained one.
        samples: of each task, length and routing scale.
        seed: of the samples.
        step: of the checkpoint; None for the newest.
        output: JSON file; None for one in the run's folder.
        plot: picture; None for one beside `output`, if matplotlib is installed.
    """

    lengths: tuple[str, ...] = ()
    suite: str = "retrieval"
    routing_scales: tuple[float, ...] = ()
    samples: int = 20
    seed: int = 0
    step: int | None = None
    output: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ConfigError(f"--suite {self.suite}: give one of {', '.join(SUITES)}")
        for scale in self.routing_scales:
            if not 0 < scale < float("inf"):
                raise ConfigError(f"--routing-scale {scale}: give numbers above 0")
        for name, values in (("length", self.tokens), ("routing-scale", self.routing_scales)):
            if len(set(values)) < len(values):
                raise ConfigError(f"--{name} {' '.join(str(value) for value in values)}: give each once")
        if self.plot is not None:
            require_extra("report", f"--plot {self.plot}")

    @property
    def tokens(self) -> tuple[int, ...]:
        """The lengths in tokens. Raises ConfigError."""
        return tuple(_tokens(length) for length in self.lengths)


def _tokens(length: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)([KM]?)", length, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--length {length}: give tokens, such as 16384, 16K (x 1024) or 1M (x 1048576)")
    return int(match[1]) * _UNITS[match[2].upper()]

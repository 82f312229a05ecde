"""Checks and their findings.

Knows words and numbers only; does not know how a check is run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from dash_dist.doctor.site import Site


class Status(Enum):
    """`WARNING`: a run works, but worse than it could, or not everywhere. `SKIPPED`: not tried; the text says why."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        name: what was tried.
        status: how it went.
        text: what was found or, where skipped, why.
        value, unit: the measured number, None where nothing is measured.
        advice: what to do, in a sentence or two; set for warnings and failures.
    """

    name: str
    status: Status
    text: str
    value: float | None = None
    unit: str = ""
    advice: str = ""

    def __post_init__(self) -> None:
        if self.status in (Status.WARNING, Status.FAILURE) and not self.advice:
            raise ValueError(f"the {self.status.value} of {self.name!r} does not say what to do")


def ok(name: str, text: str, value: float | None = None, unit: str = "") -> Finding:
    return Finding(name, Status.OK, text, value, unit)


def warning(name: str, text: str, advice: str, value: float | None = None, unit: str = "") -> Finding:
    return Finding(name, Status.WARNING, text, value, unit, advice)


def failure(name: str, text: str, advice: str, value: float | None = None, unit: str = "") -> Finding:
    return Finding(name, Status.FAILURE, text, value, unit, advice)


def skipped(name: str, why: str) -> Finding:
    return Finding(name, Status.SKIPPED, why)


class Where(Enum):
    """In what a check runs.

    `HERE`: in the doctor's own process, so only what cannot hang. `CHILD`: in a process of its own. `RANKS`: in every
    rank of a gloo group on CPUs. `GPU_RANKS`: in every rank of an NCCL group, a GPU each.
    """

    HERE = "here"
    CHILD = "child"
    RANKS = "ranks"
    GPU_RANKS = "gpu ranks"


@dataclass(frozen=True)
class Check:
    """One check; `function` is a module's function, so that other processes find it.

    Attributes:
        name: of the finding, where the check itself fails.
        function: gives the findings; those of rank 0 count.
        where: in what it runs.
        advice: what to do if it takes longer than `time_limit` seconds, its process dies, or it raises.
    """

    name: str
    function: Callable[[Site], list[Finding]]
    where: Where
    advice: str
    time_limit: float = 60.0

    def within(self, seconds: float) -> "Check":
        return replace(self, time_limit=seconds)

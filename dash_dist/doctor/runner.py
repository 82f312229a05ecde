"""All checks, one after another, and the report on them.

Knows the order and where a check runs; does not know what one does.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dash_dist.doctor.checks import CHECKS
from dash_dist.doctor.findings import Check, Finding, Status, Where, failure, skipped
from dash_dist.doctor.processes import ProcessFailure, call_in_processes, describe
from dash_dist.doctor.ranks import check_in_ranks
from dash_dist.doctor.site import Site


@dataclass(frozen=True)
class Report:
    """Findings by family of checks, in the order they were made, and how long all took."""

    families: dict[str, list[Finding]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def findings(self) -> list[Finding]:
        return [finding for family in self.families.values() for finding in family]

    @property
    def healthy(self) -> bool:
        """True if no check failed; there may be warnings."""
        return all(finding.status is not Status.FAILURE for finding in self.findings)

    def to_json(self) -> str:
        """For programs: host, seconds, and each finding with its family."""
        findings: list[dict[str, Any]] = [
            {"family": family, **asdict(finding), "status": finding.status.value}
            for family, of_family in self.families.items()
            for finding in of_family
        ]
        report = {"host": platform.node(), "healthy": self.healthy, "seconds": round(self.seconds, 1)}
        return json.dumps({**report, "findings": findings}, indent=1) + "\n"


def diagnose(
    site: Site,
    *,
    refused: str | None = None,
    checks: dict[str, Sequence[Check]] | None = None,
    watching: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run every check on `site`.

    Args:
        refused: why the run's configuration was refused; a failure of the report.
        checks: by family; all there are by default.
        watching: told the name of each check before it runs.
    """
    started = time.monotonic()
    families: dict[str, list[Finding]] = {}
    if refused is not None:
        families["configuration"] = [failure("configuration", refused, "Correct the settings that are named.")]
    for family, of_family in (CHECKS if checks is None else checks).items():
        for check in of_family:
            watching(check.name)
            families.setdefault(family, []).extend(run_check(check, site))
    return Report(families, time.monotonic() - started)


def run_check(check: Check, site: Site) -> list[Finding]:
    """The findings of one check; a check that hangs, dies or raises is a failure that carries its advice."""
    try:
        match check.where:
            case Where.HERE:
                return check.function(site)
            case Where.CHILD:
                return call_in_processes(check.function, [(site,)], time_limit=check.time_limit)[0]
            case Where.RANKS:
                return check_in_ranks(
                    check.function, site, backend="gloo", ranks=site.ranks, time_limit=check.time_limit
                )
            case Where.GPU_RANKS:
                if site.gpus < 2:
                    return [skipped(check.name, "no CUDA device" if site.gpus == 0 else "one GPU: NCCL needs two")]
                return check_in_ranks(
                    check.function, site, backend="nccl", ranks=site.gpus, time_limit=check.time_limit
                )
    except ProcessFailure as error:
        return [failure(check.name, str(error), check.advice)]
    except Exception as error:  # whatever a broken machine makes a library raise is what was to be found
        return [failure(check.name, describe(error), check.advice)]

"""Differences between curves and a profile, and the cost of logging.

Knows names of curves and numbers; does not know how either was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from dash_dist.config.upkeep import LoggingSection
from tools.benchmarks.telemetry.run import HEAT_MAP_INTERVAL, INTERVAL, ROUTING_INTERVAL
from tools.benchmarks.telemetry.spans import StepSpans

GOAL_DIFFERENCE = 0.03
GOAL_COST = 0.01
_SHORT = 0.01
"""Share of a step below which a part is shown and not judged."""
Curves = Mapping[str, Mapping[int, float]]


def compare(
    curves: Curves, first: int, steps: Sequence[StepSpans], *, flops_per_token: float, peak: float | None
) -> list[dict[str, Any]]:
    """Return one row for each quantity: means over the steps by curve and by profile, and their relative difference.

    Args:
        curves: tag -> step -> value.
        first: number of the first of `steps`.
        flops_per_token: operations of the model.
        peak: of the device in FLOP/s; None where it is not known.
    """
    numbers = range(first, first + len(steps))
    tokens = [curves["train/tokens"][number] - curves["train/tokens"][number - 1] for number in numbers]
    by_profile: dict[str, list[float]] = {"perf/step_seconds": [step.seconds for step in steps]}
    rates = [count / step.seconds for count, step in zip(tokens, steps, strict=True)]
    by_profile["perf/tokens_per_second_per_gpu"] = rates
    by_profile["perf/model_tflops_per_gpu"] = [rate * flops_per_token / 1e12 for rate in rates]
    if peak is not None:
        by_profile["perf/mfu"] = [rate * flops_per_token / peak for rate in rates]
    for kind, of_steps in (("time", [step.parts for step in steps]), ("memory", [step.memory for step in steps])):
        for name in of_steps[0]:
            by_profile[f"{kind}/{name}"] = [one[name] for one in of_steps]
    seconds = fmean(by_profile["perf/step_seconds"])
    rows = []
    for tag, values in by_profile.items():
        curve, profile = fmean(curves[tag][number] for number in numbers), fmean(values)
        judged = not tag.startswith("time/") or (profile >= _SHORT * seconds and tag != "time/rest")
        difference = (curve - profile) / profile if profile else None
        within = difference is not None and abs(difference) <= GOAL_DIFFERENCE if judged else None
        rows.append({"curve": tag, "telemetry": curve, "profile": profile, "difference": difference, "within": within})
    return rows


def cost_of_logging(seconds: Mapping[int, float]) -> dict[str, Any]:
    """Return medians of the steps by what they record, and the cost of logging as a share of a step.

    The step before a logged one waits for its device, so that the next has a beginning of its own, and the step after
    has no earlier work to wait for: with an interval above 1, the three count together.

    Args:
        seconds: step -> seconds of a run by `run.timed`.
    """
    by_kind: dict[str, list[float]] = {}
    for step, one in seconds.items():
        by_kind.setdefault(kind_of(step), []).append(one)
    medians = {kind: median(values) for kind, values in by_kind.items()}
    plain = medians["plain"]
    logged = medians["logged"] - plain
    around = medians["before"] + medians["after"] - 2 * plain
    recorded = (medians["routing"] - medians["logged"]) / LoggingSection().routing_interval
    recorded += (medians["heat map"] - medians["routing"]) / LoggingSection().heat_map_interval
    return {
        "median_seconds": medians,
        "steps": {kind: len(values) for kind, values in by_kind.items()},
        "cost_every_step": (logged + recorded) / plain,
        "cost_by_default": ((logged + around) / LoggingSection().interval + recorded) / plain,
    }


def kind_of(step: int) -> str:
    """Return what a step of `run.timed` records: nothing, curves, the routing as well, or heat maps as well."""
    for interval, kind in ((HEAT_MAP_INTERVAL, "heat map"), (ROUTING_INTERVAL, "routing")):
        if step % interval == 0:
            return kind
    return {0: "logged", 1: "after", INTERVAL - 1: "before"}.get(step % INTERVAL, "plain")

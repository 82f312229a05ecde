"""Health of a run: its state, and remarks that a person should read.

Knows what is usual and from where on it is not; does not know files nor pages.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dash_dist.report.record import Curve, RunRecord
from dash_dist.run.events import EventKind

Verdict = Literal["not started", "running", "finished", "stopped", "failed", "interrupted"]

# A run is taken to be going on for this long after its last sign of life, and for a few logging intervals.
GRACE_SECONDS = 300.0
GRACE_INTERVALS = 5

LOW_OVERLAP = 0.7
HIGH_IMBALANCE = 1.2
BETTER_IMBALANCE = 0.1  # a layout is worth naming that is better by so much
MUCH_DATA = 0.05
MUCH_SAVING = 0.10
MUCH_REST = 0.25
MUCH_WAITING_FOR_OTHERS = 1.3
NEARLY_EVERYTHING = 0.95

_EVENTS_IN_WORDS: dict[EventKind, tuple[str, str]] = {
    "restart": ("restart", "restarts"),
    "failed": ("end with an error", "ends with an error"),
    "preemption": ("preemption notice", "preemption notices"),
    "hang": ("hang", "hangs"),
    "save_failed": ("checkpoint could not be written", "checkpoints could not be written"),
    "checkpoint_damaged": ("damaged checkpoint was stepped over", "damaged checkpoints were stepped over"),
    "batch_skipped": ("batch was skipped", "batches were skipped"),
    "rollback": ("rollback", "rollbacks"),
    "metrics_failed": ("time that curves could not be written", "times that curves could not be written"),
    "resized": ("change of the number of processes", "changes of the number of processes"),
    "schedule_changed": ("change of the learning-rate curve", "changes of the learning-rate curve"),
    "trainable_changed": ("change of the trained parameters", "changes of the trained parameters"),
}

_ENDED: dict[str, Verdict] = {"finished": "finished", "stopped": "stopped", "error": "failed"}


@dataclass(frozen=True)
class Remark:
    """Something to look at; `advice` says what to do, and may be empty."""

    text: str
    advice: str = ""


def verdict(record: RunRecord) -> Verdict:
    """Return the state of the run, from its files alone.

    "stopped" was asked for, "failed" ended with an error that says what to change, "interrupted" was killed or crashed,
    which a run cannot say itself: it counts as running until it has been silent for too long.
    """
    if record.ended in _ENDED:
        return _ENDED[record.ended]
    if record.steps is not None and record.last_step >= record.steps:
        return "finished"
    if record.read_at - record.last_write < GRACE_SECONDS + GRACE_INTERVALS * _logging_seconds(record):
        return "running"
    return "interrupted" if record.last_step else "not started"


def remarks(record: RunRecord) -> list[Remark]:
    """Return unusual observations, the gravest first; empty for a healthy run."""
    return [*_of_training(record), *_of_events(record), *_of_time(record), *_of_exchange(record), *_of_routing(record)]


def _logging_seconds(record: RunRecord) -> float:
    loss = record.curve("train/loss")
    return float(np.median(np.diff(loss.times))) if loss is not None and len(loss.times) > 1 else 0.0


def _of_training(record: RunRecord) -> Iterator[Remark]:
    loss = record.curve("train/loss")
    if loss is None:
        return
    finite = loss.values[np.isfinite(loss.values)]
    if missing := len(loss.values) - len(finite):
        yield Remark(
            f"loss not finite in {_count(missing, 'logged step', 'logged steps')}",
            "lower optimizer.lr or lengthen optimizer.warmup_steps, if it comes back",
        )
    tenth = len(finite) // 10
    if tenth and finite[-tenth:].mean() > finite[:tenth].mean():
        yield Remark(
            f"the loss rose, from {finite[:tenth].mean():.3f} to {finite[-tenth:].mean():.3f}", "lower optimizer.lr"
        )


def _of_events(record: RunRecord) -> Iterator[Remark]:
    counts = Counter(event.kind for event in record.events)
    for kind, words in _EVENTS_IN_WORDS.items():
        if counts[kind]:
            yield Remark(_count(counts[kind], *words), "see the events below")


def _of_time(record: RunRecord) -> Iterator[Remark]:
    means = {part: value for part, curve in record.with_prefix("time").items() if (value := _recent(curve)) is not None}
    step = sum(value for part, value in means.items() if part != "save")
    if not step:
        return
    shares = {part: value / step for part, value in means.items()}
    if shares.get("data", 0.0) > MUCH_DATA:
        yield Remark(f"reading data takes {shares['data']:.0%} of a step", "move the data to faster storage")
    if shares.get("save", 0.0) > MUCH_SAVING:
        yield Remark(f"checkpoints hold training up by {shares['save']:.0%} of its time", "raise checkpoint.interval")
    if shares.get("rest", 0.0) > MUCH_REST:
        yield Remark(
            f"{shares['rest']:.0%} of a step is waiting",
            "with pipeline parallelism: more micro-batches (training.global_batch_size), or fewer stages",
        )
    slowest = {part: _recent(curve) for part, curve in record.with_prefix("time_max").items()}
    compute, busiest = (
        sum(seconds.get(part) or 0.0 for part in ("forward", "backward")) for seconds in (means, slowest)
    )
    if compute and busiest > MUCH_WAITING_FOR_OTHERS * compute:
        yield Remark(
            f"the slowest rank computes {busiest / compute:.2f} times as long as the mean one",
            "see the imbalance over CP ranks; if that is even, look for a slow GPU",
        )


def _of_exchange(record: RunRecord) -> Iterator[Remark]:
    planned, sent = record.curve("cp/planned_gib"), record.curve("cp/sent_gib")
    if planned is not None and sent is not None and abs(sent.last - planned.last) > 1e-3 * max(sent.last, planned.last):
        yield Remark(
            f"{sent.last:.3g} GiB were sent where {planned.last:.3g} GiB were planned", "this is a defect: report it"
        )
    overlap = _recent(record.curve("cp/overlap"))
    if overlap is not None and overlap < LOW_OVERLAP:
        yield Remark(f"overlap low: {overlap:.0%} of the exchange is hidden", "see docs/dashboards.md, 'A slow step'")
    layouts = {
        layout: value
        for layout, curve in record.with_prefix("cp/imbalance").items()
        if (value := _recent(curve)) is not None
    }
    used = layouts.get(str(record.setting("attention", "layout")))
    if used is not None and used > HIGH_IMBALANCE:
        best = min(layouts, key=lambda layout: layouts[layout])
        gain = used - layouts[best] > BETTER_IMBALANCE
        yield Remark(
            f"the busiest CP rank has {used:.2f} times the attention of the mean one",
            f"attention.layout={best} would make it {layouts[best]:.2f}" if gain else "",
        )


def _of_routing(record: RunRecord) -> Iterator[Remark]:
    density = _recent(record.curve("routing/mean_density"))
    if density is not None and density > NEARLY_EVERYTHING:
        yield Remark(
            f"routing selects {density:.0%} of the chunks: attention is as good as dense",
            "usual early in training; later, raise attention.routing_scale",
        )


def _recent(curve: Curve | None) -> float | None:
    """The mean of the last quarter."""
    return float(curve.recent.mean()) if curve is not None and len(curve.recent) else None


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"

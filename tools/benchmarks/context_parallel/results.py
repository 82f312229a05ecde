"""The rows of a run, what is derived from them, and their JSON file. Runs without a GPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dash_dist.context_parallel.exchange_counters import TrafficSummary
from tools.benchmarks.common.inputs import Case
from tools.benchmarks.context_parallel.overlap import OverlapTimes
from tools.benchmarks.context_parallel.timing import StepTime
from tools.benchmarks.kernels.measure import Cell


@dataclass(frozen=True)
class Counters:
    """Counts of an exchange in one forward + backward, over all ranks.

    coverage: blocks of other ranks that were needed / could have been, None without a plan. overlap: share of the
    flights' time that ranks did not wait, None where nothing travelled. exchanges: forward passes by name: what "auto"
    chose.
    """

    planned_bytes: int
    sent_bytes: int
    dense_bytes: int
    slow_link_bytes: int
    coverage: float | None
    overlap: float | None
    exchanges: dict[str, int]

    @classmethod
    def over_ranks(cls, summaries: Sequence[TrafficSummary]) -> Counters:
        """From every rank's own."""
        reachable = sum(summary.reachable_blocks for summary in summaries)
        transfer_seconds = sum(summary.transfer_seconds for summary in summaries)
        waited_seconds = sum(summary.waited_seconds for summary in summaries)
        return cls(
            sum(summary.planned_bytes for summary in summaries),
            sum(summary.sent_bytes for summary in summaries),
            sum(summary.dense_bytes for summary in summaries),
            sum(summary.slow_link_bytes for summary in summaries),
            sum(summary.needed_blocks for summary in summaries) / reachable if reachable else None,
            max(0.0, 1 - waited_seconds / transfer_seconds) if transfer_seconds else None,
            dict(summaries[0].exchanges),
        )


@dataclass
class ExchangeRow:
    """One case over all ranks in one layout.

    selected: (token, KV head, chunk) triples by rank. columns: this project's exchanges by name, and the dense peers.
    routing: stages 1 and 2 of the forward pass, gathering the summaries included. about: what a peer's column is.
    counters: by exchange. coverage: by a number of tokens, the share of the chunks before them that the last so many
    tokens of the sequence select between them. errors: what failed outside the columns.
    """

    case: Case
    ranks: int
    layout: str
    routing_scale: float | None = None
    selected: list[int] = field(default_factory=list)
    columns: dict[str, StepTime] = field(default_factory=dict)
    routing: Cell = field(default_factory=Cell)
    counters: dict[str, Counters] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        case = self.case
        return f"{case.seq_len} ({case.query_heads}, {case.kv_heads}) {case.asked_density:g} {self.layout}"

    @property
    def density(self) -> float | None:
        return sum(self.selected) / self.case.available if self.selected else None

    @property
    def imbalance(self) -> float | None:
        """Largest / mean selected triples of a rank."""
        return max(self.selected) / statistics.fmean(self.selected) if self.selected else None

    def tokens_per_second(self, column: str) -> float | None:
        """Tokens per second of forward + backward, all ranks together."""
        milliseconds = self.columns[column].step.median_ms if column in self.columns else None
        return None if milliseconds is None else self.case.seq_len / milliseconds * 1000

    @property
    def fastest_dense(self) -> str | None:
        """The dense peer with the most tokens per second."""
        rates = {name: rate for name in self.dense if (rate := self.tokens_per_second(name)) is not None}
        return max(rates, key=lambda name: rates[name]) if rates else None

    def speed_up(self, column: str) -> float | None:
        """Tokens per second over the fastest dense peer's."""
        own, peer = self.tokens_per_second(column), self.fastest_dense
        return None if own is None or peer is None else own / (self.tokens_per_second(peer) or float("nan"))


@dataclass
class WeakRow:
    """All GPUs at T against one GPU at T / ranks, with as many selected triples per GPU: one sequence of a higher
    density, or as many sequences of the same density as there are ranks.

    alone: every GPU computes its `sequences` of alone_case by itself, all the same at the same time; on both sides the
    slowest GPU counts. Routing as in ExchangeRow. selected: triples of the busiest rank together, and of one alone.
    """

    case: Case
    alone_case: Case
    ranks: int
    exchange: str
    together: StepTime
    alone: StepTime
    routing_together: Cell
    routing_alone: Cell
    selected: tuple[int, int]
    sequences: int = 1

    @property
    def efficiency(self) -> float | None:
        """One GPU's time over all GPUs'."""
        alone, together = self.alone.step.median_ms, self.together.step.median_ms
        return None if alone is None or together is None else alone / together

    @property
    def efficiency_without_routing(self) -> float | None:
        """The same, stages 1 and 2 of the forward pass subtracted on both sides: their cost per token grows with T."""
        times = (self.alone.step, self.routing_alone, self.together.step, self.routing_together)
        alone, alone_routing, together, together_routing = (cell.median_ms for cell in times)
        if alone is None or alone_routing is None or together is None or together_routing is None:
            return None
        return (alone - alone_routing) / (together - together_routing)


@dataclass
class OverlapRow:
    """Share of an exchange's transfers that computation hides; see `overlap.py`. counted: the exchange's own count,
    the share of its flights' time that the rank did not wait.
    """

    case: Case
    ranks: int
    exchange: str
    times: OverlapTimes = field(default_factory=OverlapTimes)
    counted: float | None = None
    error: str | None = None


@dataclass
class Results:
    """link: bytes that every rank sent, milliseconds that it took, GB/s per rank. errors: what failed outside of the
    rows, by what it was.
    """

    environment: dict[str, Any]
    link: dict[str, float] = field(default_factory=dict)
    exchanges: list[ExchangeRow] = field(default_factory=list)
    weak: list[WeakRow] = field(default_factory=list)
    overlap: list[OverlapRow] = field(default_factory=list)
    layouts: list[ExchangeRow] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write one object, with derived figures next to their sources."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        for rows, entries in ((self.exchanges, content["exchanges"]), (self.layouts, content["layouts"])):
            for row, entry in zip(rows, entries, strict=True):
                entry["derived"] = {
                    "density": row.density,
                    "imbalance": row.imbalance,
                    "tokens_per_second": {name: row.tokens_per_second(name) for name in row.columns},
                    "speed_up_over_dense": {name: row.speed_up(name) for name in row.columns if name not in row.dense},
                }
        for weak, entry in zip(self.weak, content["weak"], strict=True):
            entry["derived"] = {
                "efficiency": weak.efficiency,
                "efficiency_without_routing": weak.efficiency_without_routing,
            }
        for overlapped, entry in zip(self.overlap, content["overlap"], strict=True):
            entry["derived"] = {"overlap": overlapped.times.overlap, "spread": overlapped.times.spread}
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, first: Path, *others: Path) -> Results:
        """Read the files of `write`; joins the rows of several runs, with environment and link of the first."""
        contents = [json.loads(path.read_text()) for path in (first, *others)]

        def rows(name: str) -> list[dict[str, Any]]:
            return [entry for content in contents for entry in content[name]]

        return cls(
            contents[0]["environment"],
            contents[0]["link"],
            [_exchange_row(entry) for entry in rows("exchanges")],
            [_weak_row(entry) for entry in rows("weak")],
            [_overlap_row(entry) for entry in rows("overlap")],
            [_exchange_row(entry) for entry in rows("layouts")],
            {what: error for content in contents for what, error in content["errors"].items()},
        )


def _exchange_row(entry: dict[str, Any]) -> ExchangeRow:
    return ExchangeRow(
        **_without_derived(entry)
        | {
            "case": Case(**entry["case"]),
            "columns": {name: _step_time(column) for name, column in entry["columns"].items()},
            "routing": Cell(**entry["routing"]),
            "counters": {name: Counters(**counted) for name, counted in entry["counters"].items()},
        }
    )


def _weak_row(entry: dict[str, Any]) -> WeakRow:
    return WeakRow(
        **_without_derived(entry)
        | {"case": Case(**entry["case"]), "alone_case": Case(**entry["alone_case"])}
        | {name: _step_time(entry[name]) for name in ("together", "alone")}
        | {name: Cell(**entry[name]) for name in ("routing_together", "routing_alone")}
        | {"selected": tuple(entry["selected"])}
    )


def _overlap_row(entry: dict[str, Any]) -> OverlapRow:
    return OverlapRow(
        **_without_derived(entry) | {"case": Case(**entry["case"]), "times": OverlapTimes(**entry["times"])}
    )


def _step_time(entry: dict[str, Any]) -> StepTime:
    return StepTime(Cell(**entry["step"]), Cell(**entry["forward"]), entry["peak_bytes"])


def _without_derived(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "derived"}

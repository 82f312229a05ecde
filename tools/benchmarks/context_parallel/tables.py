"""The tables printed from the rows of a run. Runs without a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from tools.benchmarks.common.markdown import number, table
from tools.benchmarks.context_parallel.results import Counters, ExchangeRow, OverlapRow, Results, WeakRow
from tools.benchmarks.kernels.measure import Cell

GIB = 2**30


def tables(results: Results) -> str:
    """Markdown: times, speed-ups, bytes, memory, weak scaling, overlap, layouts, then errors as a list."""
    sections = [
        *(_exchange_tables("Exchanges", results.exchanges) if results.exchanges else []),
        *([_weak_table(results.weak)] if results.weak else []),
        *([_overlap_table(results.overlap)] if results.overlap else []),
        *(_exchange_tables("Layouts", results.layouts) if results.layouts else []),
    ]
    if results.link:
        sections.append(
            f"Links: an all-to-all of {results.link['bytes'] / GIB:.2f} GiB from every rank took "
            f"{results.link['milliseconds']:.2f} ms, {results.link['gigabytes_per_second']:.1f} GB/s per rank"
        )
    failures = _failures(results)
    return "\n\n".join([*sections, *(["\n".join(["Not run, or failed:", *failures])] if failures else [])])


def _exchange_tables(title: str, rows: list[ExchangeRow]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    sections = [
        _by_row(
            f"{title}, milliseconds of forward + backward (forward), medians of the slowest rank",
            rows,
            {name: _column_time(name) for name in names}
            | ({"stages 1 and 2": lambda row: _cell(row.routing)} if any(row.routing.repeats for row in rows) else {}),
        ),
        _by_row(
            f"{title}, thousand tokens per second of forward + backward (times the fastest dense peer)",
            rows,
            {name: _rate(name) for name in names},
        ),
        _by_row(
            f"{title}, routing and peak memory of the busiest rank beyond inputs, output and their gradients, GiB",
            rows,
            {
                "density": lambda row: number(row.density, 4),
                "routing_scale": lambda row: number(row.routing_scale, 4),
                "max / mean selected": lambda row: number(row.imbalance, 4),
            }
            | {f"{name} GiB": _peak(name) for name in names},
        ),
    ]
    counted = [(row, name) for row in rows for name in row.counters]
    if counted:
        cells = [[row.label, name, *(show(row.counters[name]) for show in COUNTED.values())] for row, name in counted]
        header = ["T, heads, density asked, layout", "exchange", *COUNTED]
        sections.append(table(f"{title}, bytes of all ranks in one forward + backward", header, cells))
    return sections


# By heading: what is shown of an exchange's counters.
COUNTED: dict[str, Callable[[Counters], str]] = {
    "planned GiB": lambda counters: number(counters.planned_bytes / GIB, 3),
    "sent / planned": lambda counters: _ratio(counters.sent_bytes, counters.planned_bytes),
    "sent / dense": lambda counters: _ratio(counters.sent_bytes, counters.dense_bytes),
    "coverage": lambda counters: number(counters.coverage, 3),
    "chosen": lambda counters: ", ".join(counters.exchanges),
    "not waited for": lambda counters: number(counters.overlap, 3),
}


def _by_row(title: str, rows: list[ExchangeRow], columns: dict[str, Callable[[ExchangeRow], str]]) -> str:
    cells = [[row.label, *(show(row) for show in columns.values())] for row in rows]
    return table(title, ["T, heads, density asked, layout", *columns], cells)


def _column_time(name: str) -> Callable[[ExchangeRow], str]:
    def show(row: ExchangeRow) -> str:
        column = row.columns.get(name)
        if column is None:
            return "-"
        return "not run" if column.step.error else f"{_cell(column.step)} ({_cell(column.forward)})"

    return show


def _rate(name: str) -> Callable[[ExchangeRow], str]:
    def show(row: ExchangeRow) -> str:
        rate, speed_up = row.tokens_per_second(name), row.speed_up(name)
        if rate is None:
            return "-"
        return number(rate / 1000, 1) + ("" if speed_up is None else f" ({number(speed_up, 2)})")

    return show


def _peak(name: str) -> Callable[[ExchangeRow], str]:
    def show(row: ExchangeRow) -> str:
        peaks = row.columns[name].peak_bytes if name in row.columns else []
        return number(max(peaks) / GIB, 2) if peaks else "-"

    return show


def _weak_table(rows: list[WeakRow]) -> str:
    header = [
        "T, density, exchange",
        "ms",
        "alone: sequences x T, density",
        "ms",
        "efficiency",
        "without stages 1 and 2",
    ]
    cells = [
        [
            f"{row.case.seq_len}, {row.case.asked_density:g}, {row.exchange}",
            f"{_cell(row.together.step)}, stages 1 and 2 {_cell(row.routing_together)}",
            f"{row.sequences} x {row.alone_case.seq_len}, {row.alone_case.asked_density:.4g}",
            f"{_cell(row.alone.step)}, stages 1 and 2 {_cell(row.routing_alone)}",
            number(row.efficiency, 3),
            number(row.efficiency_without_routing, 3),
            number(row.selected[0] / row.selected[1] if row.selected[1] else None, 3),
        ]
        for row in rows
    ]
    title = "Weak scaling: all GPUs at T against one GPU at T / GPUs with the same selected triples per GPU"
    return table(title, [*header, "selected: busiest rank / one GPU"], cells)


def _overlap_table(rows: list[OverlapRow]) -> str:
    header = ["T, density, exchange", "both ms", "flights ms", "computation ms", "rounds", "overlap"]
    cells = []
    for row in rows:
        spread = row.times.spread
        medians = [
            number(statistics.median(times) if times else None, 2)
            for times in (row.times.both, row.times.communication, row.times.compute)
        ]
        cells.append(
            [
                f"{row.case.seq_len}, {row.case.asked_density:g}, {row.exchange}",
                *medians,
                str(len(row.times.both)),
                number(row.times.overlap, 3),
                "-" if spread is None else f"{spread[0]:.3f} to {spread[1]:.3f}",
                number(row.counted, 3),
            ]
        )
    return table("Overlap", [*header, "of single rounds", "counted by the exchange"], cells)


def _failures(results: Results) -> list[str]:
    lines = [f"- {what}: {error}" for what, error in results.errors.items()]
    for row in [*results.exchanges, *results.layouts]:
        errors = row.errors | {name: column.step.error for name, column in row.columns.items() if column.step.error}
        lines += [f"- {row.label}: {name}: {error}" for name, error in errors.items()]
    for weak in results.weak:
        both = {"together": weak.together, "alone": weak.alone}
        failed = {name: time.step.error for name, time in both.items() if time.step.error}
        what = f"weak scaling, {weak.case.seq_len}, {weak.sequences} alone"
        lines += [f"- {what}: {name}: {error}" for name, error in failed.items()]
    lines += [f"- overlap, {row.case.seq_len}: {row.error}" for row in results.overlap if row.error]
    return lines


def _cell(cell: Cell) -> str:
    return "error" if cell.error else number(cell.median_ms, 2)


def _ratio(part: int, whole: int) -> str:
    return number(part / whole if whole else None, 3)

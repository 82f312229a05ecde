"""Tables of the results in markdown.

Knows what is compared; does not know how it was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from tools.benchmarks.common.markdown import provenance, table
from tools.study.results import Record
from tools.study.summary import (
    Estimate,
    MethodResults,
    PartResults,
    accuracy,
    by_part,
    held_out_loss,
    last_density,
    of_retrieving_layer,
)
from tools.study.tasks import TASKS


def as_markdown(records: Sequence[Record]) -> str:
    """Return the tables of all parts that have results.

    Raises:
        ValueError: see `by_part`.
    """
    sections = []
    for part in by_part(records):
        tables = _of_task(part) if part.of_task else [_of_code(part)]
        sections.append("\n\n".join([f"### {part.name}", *_sources(part), *tables]))
    return "\n\n".join(sections or ["No results."]) + "\n"


def _sources(part: PartResults) -> list[str]:
    """Return the lines that say where the results come from, and which do not have the same texts."""
    records = [record for method in part.methods for record in method.records]
    lines = list(dict.fromkeys(line for record in records for line in provenance(record["environment"])))
    texts = {record["texts"] for record in records}
    if len(texts) > 1:
        lines.append(f"Not all models have read the same texts: {', '.join(sorted(texts))}.")
    if not all(method.alone for method in part.methods):
        lines.append("Methods without a time have models that shared their GPU with others (`--jobs`).")
    return ["  \n".join(lines)]


def _of_task(part: PartResults) -> list[str]:
    task = TASKS[part.corpus]
    length = part.trained_length
    by_difficulty = _table(
        f"Accuracy at {length:,} tokens by {task.measure}: {task.about}",
        part,
        [str(one) for one in part.difficulties] + ["all", "density"],
        lambda method: [
            *(_test(method, length, 3, accuracy(one)) for one in part.difficulties),
            _test(method, length, 3, accuracy()),
            _test(method, length, 3, _density),
        ],
        last=["chance", *(f"{task.chance(one):.3f}" for one in part.difficulties)],
    )
    by_length = _table(
        "Accuracy by tokens of the text",
        part,
        [f"{one:,}" for one in part.lengths],
        lambda method: [_test(method, one, 3, accuracy()) for one in part.lengths],
    )
    attention = _table(
        "Attention of a question's last token in the layer that retrieves, by tokens of the text: mass on the chunks "
        "of its facts / entropy over chunks in nats / share of those chunks that are selected",
        part,
        [f"{one:,}" for one in part.lengths],
        lambda method: [
            " / ".join(_test(method, one, 2, of_retrieving_layer(name)) for name in ("mass", "entropy", "found"))
            for one in part.lengths
        ],
    )
    return [by_difficulty, by_length, attention, _dials(part)]


def _dials(part: PartResults) -> str:
    rows = []
    for method in part.methods:
        for dial in [{}, *method.dials]:
            changed = ", ".join(f"{name} {value:g}" for name, value in dial.items()) or "as trained"
            tested = functools.partial(method.of_test, part.trained_length, dial)
            time = tested(lambda score: 1e3 * float(score["seconds"])) if method.alone else None
            cells = [_text(tested(accuracy()), 3), _text(tested(_density), 3), _text(time, 1)]
            rows.append([method.method, changed, *cells, str(len(method.records))])
    header = ["method", "tested with", "accuracy", "density", "ms of a text", "seeds"]
    return table(f"Settings of one trained model at {part.trained_length:,} tokens", header, rows)


def _of_code(part: PartResults) -> str:
    tags = sorted(part.methods[0].records[0]["training"]["heldout"], key=_end_of_bucket)
    return _table(
        "Loss on held-out packages in nats per byte, by position",
        part,
        [*(tag.removeprefix("heldout/loss").strip("/") or "all" for tag in tags), "density", "tokens/s"],
        lambda method: [
            *(_text(method.of_training(held_out_loss(tag)), 4) for tag in tags),
            _text(method.of_training(last_density), 3),
            _text(method.of_training(lambda training: training["tokens_per_second"]) if method.alone else None, 0),
        ],
    )


def _table(
    title: str,
    part: PartResults,
    header: Sequence[str],
    cells: Callable[[MethodResults], Sequence[str]],
    last: Sequence[str] = (),
) -> str:
    """Return a table of a row for each method, and one more that need not have all cells."""
    rows = [[method.method, *cells(method), str(len(method.records))] for method in part.methods]
    if last:
        rows.append([*last, *["-"] * (len(header) + 2 - len(last))])
    return table(title, ["method", *header, "seeds"], rows)


def _test(method: MethodResults, length: int, digits: int, value: Callable[[Record], float]) -> str:
    return _text(method.of_test(length, {}, value), digits)


def _text(estimate: Estimate | None, digits: int) -> str:
    return "-" if estimate is None else estimate.text(digits)


def _density(score: Record) -> float:
    return float(score["density"])


def _end_of_bucket(tag: str) -> int:
    return int(tag.rpartition("-")[2]) if "-" in tag else 0

"""Results of one part by method, and their mean and spread over the seeds.

Knows records; does not know tables or pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from tools.study.parts import parts
from tools.study.results import Record
from tools.study.sizes import SIZES, Settings


@dataclass(frozen=True)
class Estimate:
    """Mean of some seeds, and their standard deviation; None for one seed."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate from one value per seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def text(self, digits: int) -> str:
        """Return mean and spread as they stand in a table."""
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class MethodResults:
    """Results of one method in one part, one record for each seed."""

    method: str
    records: tuple[Record, ...]

    @property
    def alone(self) -> bool:
        """No model shared its GPU with another one: its times count."""
        return all(record.get("jobs") == 1 for record in self.records)

    def of_training(self, value: Callable[[Record], float | None]) -> Estimate | None:
        """Estimate a value of the training; None where a seed lacks it."""
        values = [value(record["training"]) for record in self.records]
        known = [one for one in values if one is not None]
        return Estimate.of(known) if len(known) == len(values) else None

    def of_test(self, length: int, attention: Settings, value: Callable[[Record], float]) -> Estimate | None:
        """Estimate a value of the scores at a length and with changed settings; None where a seed lacks the test."""
        found = [
            value(score)
            for record in self.records
            for score in record["scores"]
            if score["length"] == length and score["attention"] == attention
        ]
        return Estimate.of(found) if len(found) == len(self.records) else None

    @property
    def dials(self) -> list[Settings]:
        """Settings other than the trained ones that it was tested with."""
        return _once(score["attention"] for score in self.records[0]["scores"] if score["attention"])


@dataclass(frozen=True)
class PartResults:
    """Results of one part.

    Attributes:
        methods: in the part's order.
        trained_length: tokens of the longest text in the training of a task.
    """

    name: str
    corpus: str
    methods: tuple[MethodResults, ...]
    trained_length: int

    @property
    def of_task(self) -> bool:
        """The models were tested on a task, not on code."""
        return "scores" in self.methods[0].records[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of the tests with the trained settings."""
        scores = self.methods[0].records[0]["scores"]
        return sorted({score["length"] for score in scores if not score["attention"]})

    @property
    def difficulties(self) -> list[int]:
        """Those of the questions at the length of the training."""
        (score,) = [
            one
            for one in self.methods[0].records[0]["scores"]
            if one["length"] == self.trained_length and not one["attention"]
        ]
        return sorted(int(name) for name in score["asked"])


def by_part(records: Sequence[Record]) -> list[PartResults]:
    """Sort records by part and method.

    Raises:
        ValueError: they are of several sizes of the study.
    """
    sizes = {record["size"] for record in records}
    if len(sizes) > 1:
        raise ValueError(f"results of the sizes {' and '.join(sorted(sizes))}: give them folders of their own")
    found = []
    for size_name in sizes:
        size = SIZES[size_name]
        for part in parts(size).values():
            of_part = [record for record in records if record["part"] == part.name]
            methods = tuple(
                MethodResults(name, tuple(record for record in of_part if record["method"] == name))
                for name in part.methods
                if any(record["method"] == name for record in of_part)
            )
            if methods:
                found.append(PartResults(part.name, part.corpus, methods, size.trained_length))
    return found


def accuracy(difficulty: int | None = None) -> Callable[[Record], float]:
    """Return the accuracy of a score, over all questions or those of a difficulty."""

    def value(score: Record) -> float:
        names = score["asked"] if difficulty is None else [str(difficulty)]
        return float(sum(score["correct"][name] for name in names) / sum(score["asked"][name] for name in names))

    return value


def of_retrieving_layer(name: str) -> Callable[[Record], float]:
    """Return a measure of the layer whose attention has most mass on the evidence."""

    def value(score: Record) -> float:
        return float(max(score["layers"], key=lambda layer: float(layer["mass"]))[name])

    return value


def held_out_loss(tag: str) -> Callable[[Record], float | None]:
    """Return the last value of a curve of held-out losses."""
    return lambda training: training["heldout"].get(tag)


def last_density(training: Record) -> float | None:
    """Return the density at the end of a training, mean over the layers; None where nothing is selected."""
    curve = training["density"].get("routing/mean_density")
    return None if not curve else float(curve[max(curve, key=int)])


def _once(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found

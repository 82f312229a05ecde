"""The parts of the study: each is one question, the texts that ask it, and the methods that answer.

Knows names; does not know settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tools.study.methods import ablations, budget_methods, main_methods
from tools.study.sizes import Size
from tools.study.tasks import TASKS


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        corpus: a task, or a key of `Size.code_lengths`.
        methods: by name.
    """

    name: str
    corpus: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One model: trained once and tested once."""

    part: str
    corpus: str
    method: str
    seed: int

    @property
    def run(self) -> str:
        """Name of its run. Parts that ask for the same model share it."""
        return f"{self.corpus}.{self.method}.{self.seed}"

    @property
    def title(self) -> str:
        """Name for messages."""
        return f"{self.part} {self.method} seed {self.seed}"


def parts(size: Size) -> dict[str, Part]:
    """Return the parts in the order in which they are run."""
    main = main_methods(size)
    found = [Part(task, task, main) for task in TASKS]
    found += [Part(corpus, corpus, main) for corpus in size.code_lengths]
    found.append(Part("budgets", "missing", budget_methods(size)))
    found += [Part(f"ablations-{task}", task, ablations(size)) for task in ("needle", "missing")]
    return {part.name: part for part in found}


def cells(chosen: list[Part], seeds: int, only: tuple[str, ...] = ()) -> Iterator[Cell]:
    """Yield the models of the parts, a whole comparison by one seed before the next seed.

    Args:
        only: methods, all if empty.
    """
    for seed in range(seeds):
        for part in chosen:
            for method in part.methods:
                if not only or method in only:
                    yield Cell(part.name, part.corpus, method, seed)

"""The synthetic tasks: which facts a question has, and how many.

Knows facts and answers; does not know where they lie in a text. Each text depends on its seed alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tools.study.text import QUESTION, SYMBOLS, Group, Haystack, Text, asked_of, keys

MakeGroup = Callable[[random.Random, Iterator[str], int], Group]

_SIGNS = "!#$%&*+<=>"
_FIRST_CELL, _FIRST_GROUPS, _FIRST_DRAWS = 16, 4, 2
"""Of the first texts: symbols of a cell, groups of facts at most, and questions for each."""
_MOST_QUESTIONS = 4
"""Questions take at most one of so many symbols of a text."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        measure: of a question's difficulty, for titles.
        difficulties: what a group of facts may have, ascending.
        facts: of a group, by its difficulty.
        chance: accuracy of a guess among the answers that the question leaves open to a model that finds no fact.
        filled: share of the slots that facts take, at most.
        width: symbols of a fact.
        one_per_cell: a cell has one fact at the most.
        distractors: see `Haystack`.
        apart: see `Group`.
        first_length: tokens of the texts that are trained on first: a few facts and questions, as short as they can be.
    """

    about: str
    measure: str
    make: MakeGroup
    difficulties: tuple[int, ...]
    facts: Callable[[int], int]
    chance: Callable[[int], float]
    filled: float
    width: int = 4
    one_per_cell: bool = False
    distractors: bool = False
    apart: bool = True
    first_length: int = 64

    def first_text(self, seed: str) -> Text:
        """Make a text to train on first: a few facts, each asked for any number of times."""
        rng = random.Random(seed)
        haystack = self._haystack(_FIRST_CELL)
        groups = replace(self, filled=1.0)._groups(rng, haystack, self.first_length, most=_FIRST_GROUPS)
        return haystack.write(rng, groups, self.first_length, draws=_FIRST_DRAWS * len(groups))

    def text(self, seed: str, *, length: int, planned: int, cell: int) -> Text:
        """Make the text of a seed.

        Args:
            length: tokens of the text, the end of its document counted.
            planned: a longer text has the facts and questions that one of so many tokens would have, further apart.
            cell: symbols of a cell, see `Haystack`.

        Raises:
            ValueError: the length is too short for one question.
        """
        rng = random.Random(seed)
        haystack = self._haystack(cell)
        groups = self._groups(rng, haystack, min(length, planned))
        if not groups:
            raise ValueError(f"{min(length, planned)} tokens in cells of {cell} are too few: give twice as many")
        return haystack.write(rng, groups, length)

    def _haystack(self, cell: int) -> Haystack:
        return Haystack(cell, self.width, 1 if self.one_per_cell else cell // self.width, self.distractors)

    def _groups(self, rng: random.Random, haystack: Haystack, length: int, *, most: int | None = None) -> list[Group]:
        """Make groups of every difficulty in turn, until the slots are filled as far as they may be, or `most`."""
        names, found, facts = keys(rng), list[Group](), 0
        most_facts = haystack.cells(length, 0) // 2 if self.apart else length
        possible = [one for one in self.difficulties if self.facts(one) <= most_facts]
        for difficulty in itertools.islice(itertools.cycle(possible), most):
            questions = asked_of(len(found) + 1)
            room = self.filled * haystack.per_cell * haystack.cells(length, questions)
            facts += self.facts(difficulty)
            if facts > room or questions * QUESTION * _MOST_QUESTIONS > length:
                break
            found.append(self.make(rng, names, difficulty))
        return found


def _recall(rng: random.Random, names: Iterator[str], difficulty: int) -> Group:
    key, value = next(names), rng.choice(SYMBOLS)
    return Group(key, (f";{key}{value}",), value, difficulty)


def _missing(rng: random.Random, names: Iterator[str], difficulty: int) -> Group:
    """A key has all but one of the first `difficulty` + 1 symbols: no fact less can tell which one it lacks."""
    key = next(names)
    *present, lacking = rng.sample(SYMBOLS[: difficulty + 1], difficulty + 1)
    sign = _SIGNS[difficulty.bit_length() - 1]
    return Group(key, tuple(f";{key}{value}" for value in present), lacking, difficulty, sign)


def _variables(rng: random.Random, names: Iterator[str], difficulty: int) -> Group:
    """A value, and a chain of `difficulty` names that get it from each other; the last one is asked for."""
    chain = [next(names) for _ in range(difficulty + 1)]
    value = rng.choice(SYMBOLS)
    steps = (f":{name}{source}" for source, name in itertools.pairwise(chain))
    return Group(chain[-1], (f";{chain[0]}{value}", *steps), value, difficulty)


def _overwritten(rng: random.Random, names: Iterator[str], difficulty: int) -> Group:
    key, values = next(names), rng.sample(SYMBOLS, difficulty)
    return Group(key, tuple(f";{key}{value}" for value in values), values[-1], difficulty)


_OTHERS, _OCCURRENCES, _VALUES = 3, 4, 8
"""Values of a key besides the most frequent one, how often each occurs, and the number of values that there are."""


def _frequent(rng: random.Random, names: Iterator[str], difficulty: int) -> Group:
    """The value that a key has most often, `difficulty` times more often than each other one of its values."""
    key = next(names)
    winner, *others = rng.sample(SYMBOLS[:_VALUES], 1 + _OTHERS)
    values = [winner] * (_OCCURRENCES + difficulty) + others * _OCCURRENCES
    rng.shuffle(values)
    return Group(key, tuple(f";{key}{value}" for value in values), winner, difficulty, apart=False)


def _blind(difficulty: int) -> float:
    return 1 / len(SYMBOLS)


TASKS = {
    "recall": Task(
        "the value of a key that occurs once",
        "relevant chunks",
        _recall,
        (1,),
        lambda _: 1,
        _blind,
        filled=1 / 8,
    ),
    "needle": Task(
        "the value of a key that is alone among random symbols in its chunk",
        "relevant chunks",
        _recall,
        (1,),
        lambda _: 1,
        _blind,
        filled=1.0,
        one_per_cell=True,
        distractors=True,
        first_length=128,
    ),
    "missing": Task(
        "the one value that a key lacks: its facts, each in another chunk, are all needed",
        "relevant chunks",
        _missing,
        (1, 2, 4, 8, 16, 32),
        lambda chunks: chunks,
        lambda chunks: 1 / (chunks + 1),
        filled=1 / 2,
        first_length=128,
    ),
    "variables": Task(
        "the value that a name got through other names",
        "hops",
        _variables,
        (1, 2, 3, 4, 6, 8),
        lambda hops: hops + 1,
        _blind,
        filled=1 / 4,
        width=5,
        first_length=128,
    ),
    "overwritten": Task(
        "the last of the values that a key was given",
        "writes",
        _overwritten,
        (1, 2, 4, 8),
        lambda writes: writes,
        _blind,
        filled=1 / 4,
        first_length=128,
    ),
    "frequent": Task(
        "the value that a key has most often, from facts all over the text",
        "lead",
        _frequent,
        (1, 2, 4, 8),
        lambda lead: _OCCURRENCES * (1 + _OTHERS) + lead,
        lambda _: 1 / _VALUES,
        filled=1 / 2,
        apart=False,
        first_length=128,
    ),
}

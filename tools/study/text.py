"""Texts of the synthetic tasks: facts at random places of a haystack, and questions about them behind it.

Knows places and symbols, one byte and so one token each; does not know which facts answer a question.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.benchmarks.common.conversations import Turn, as_messages

SYMBOLS = string.ascii_letters + string.digits
"""Symbols of keys and values. Signs of facts and questions, and `FILLER`, are others."""
FILLER = "."
QUESTION = 4
"""Symbols of a question: sign, key of two, answer."""
_GROUPS_PER_QUESTION = 2
"""If all groups were asked for, a model could leave out the answers that were given: a small one learns only that."""


@dataclass(frozen=True)
class Group:
    """Facts about one key, and the question that they answer.

    Attributes:
        facts: in the order that they have in the text.
        difficulty: see `Task`.
        sign: symbol before the key in the question.
        apart: no two of the facts are in one cell.
    """

    key: str
    facts: tuple[str, ...]
    answer: str
    difficulty: int
    sign: str = "?"
    apart: bool = True


@dataclass(frozen=True)
class Question:
    """One question of a text.

    Attributes:
        place: of the answer in the text. The symbol before it ends the question.
        evidence: places of the last symbols of its group's facts.
    """

    place: int
    answer: str
    difficulty: int
    evidence: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A text that ends with its questions, answered."""

    text: str
    questions: tuple[Question, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The text as a conversation, of which the assistant says the answers."""
        places = [question.place for question in self.questions]
        begins = [0, *(place + 1 for place in places)]
        return as_messages(
            Turn(self.text[begin:place], self.text[place]) for begin, place in zip(begins, places, strict=False)
        )


@dataclass(frozen=True)
class Haystack:
    """Cells of equal size, each of slots that hold a fact or filler.

    Attributes:
        cell: symbols; those of a chunk, so that facts in other cells are in other chunks.
        width: symbols of a slot.
        per_cell: facts of a cell at most.
        distractors: the filler is symbols at random in place of `FILLER`.
    """

    cell: int
    width: int
    per_cell: int
    distractors: bool

    def cells(self, length: int, questions: int) -> int:
        """Return the cells of a text of `length` tokens, the end of its document counted, before the questions."""
        return (length - 1 - questions * QUESTION) // self.cell

    def write(self, rng: random.Random, groups: Sequence[Group], length: int, *, draws: int | None = None) -> Text:
        """Write the facts of the groups at random places of `length` - 1 symbols, and questions for some at the end.

        A group that finds no places is left out. Facts that may share cells go anywhere.

        Args:
            draws: questions, each about any group. By default, half of the groups are asked for, each once.
        """
        asked = rng.sample(groups, asked_of(len(groups))) if draws is None else rng.choices(groups, k=draws)
        slots = {cell: self._slots(rng) for cell in range(self.cells(length, len(asked)))}
        places_of: dict[str, list[int]] = {}
        for group in sorted(groups, key=lambda one: -len(one.facts)):
            if (places := self._places(rng, group, slots)) is not None:
                places_of[group.key] = places
        asked = [group for group in asked if group.key in places_of]
        tail = "".join(f"{group.sign}{group.key}{group.answer}" for group in asked)
        body = self._filler(rng, length - 1 - len(tail))
        for group in (one for one in groups if one.key in places_of):
            for place, fact in zip(places_of[group.key], group.facts, strict=True):
                body[place : place + self.width] = fact.ljust(self.width, FILLER)
        ends = itertools.count(len(body) + QUESTION - 1, QUESTION)
        questions = tuple(
            Question(end, group.answer, group.difficulty, self._ends(group, places_of[group.key]))
            for group, end in zip(asked, ends, strict=False)
        )
        return Text("".join(body) + tail, questions)

    def _slots(self, rng: random.Random) -> list[int]:
        free = list(range(self.cell // self.width))
        rng.shuffle(free)
        return free[: self.per_cell]

    def _places(self, rng: random.Random, group: Group, slots: dict[int, list[int]]) -> list[int] | None:
        """Take slots for the facts of a group, ascending; None where too few are free."""
        count = len(group.facts)
        free = [cell for cell, of_cell in slots.items() for _ in (of_cell[:1] if group.apart else of_cell)]
        if count > len(free):
            return None
        return sorted(cell * self.cell + slots[cell].pop() * self.width for cell in rng.sample(free, count))

    def _filler(self, rng: random.Random, count: int) -> list[str]:
        return rng.choices(SYMBOLS, k=count) if self.distractors else [FILLER] * count

    def _ends(self, group: Group, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(place + len(fact) - 1 for place, fact in zip(places, group.facts, strict=True))


def asked_of(groups: int) -> int:
    """Return how many of a text's groups are asked for."""
    return -(-groups // _GROUPS_PER_QUESTION)


def keys(rng: random.Random) -> Iterator[str]:
    """Yield keys of two symbols at random, each once. There are 3,844."""
    given: set[str] = set()
    while len(given) < len(SYMBOLS) ** 2:
        key = rng.choice(SYMBOLS) + rng.choice(SYMBOLS)
        if key not in given:
            given.add(key)
            yield key

"""A text of any length that ends with a question about itself.

Knows the parts of such a text; does not know tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dash_dist.evaluation.words import Filler


@dataclass(frozen=True)
class Question:
    """One sample of a task, in text.

    Attributes:
        text: from a number of units, sentences or words, to the whole text with the question; more units are more text.
        least: fewest units.
        answer: right continuation of the text; begins with a space.
        expected: parts of the answer that count.
        depths: of the part of the text that each of `expected` is found in, from 0, the beginning, to 1; empty where
            the answer depends on all of the text.
    """

    text: Callable[[int], str]
    least: int
    answer: str
    expected: tuple[str, ...]
    depths: tuple[float, ...] = ()


def hidden_facts(
    rng: random.Random,
    introduction: str,
    facts: Sequence[tuple[float, str]],
    question: str,
    expected: Sequence[str],
    depths: Sequence[float],
) -> Question:
    """A question about sentences that are hidden among others.

    Args:
        facts: depth and sentence of each; of equal depths, the first comes first.
        expected, depths: see `Question`.
    """
    filler = Filler(rng)
    backwards = sorted(facts, key=lambda fact: fact[0])[::-1]

    def text(units: int) -> str:
        sentences = list(filler.first(units))
        for depth, fact in backwards:
            sentences.insert(round(depth * units), fact)
        return f"\n{introduction}\n{' '.join(sentences)}\n{question}"

    return Question(text, 1, " " + ", ".join(expected), tuple(expected), tuple(depths))


def evenly_spread(index: int) -> float:
    """Return a number in [0, 1): those of the first n indices are spread evenly, for any n.

    They are 0, 1/2, 1/4, 3/4, 1/8 and so on, the sequence of van der Corput in base 2.
    """
    number, share = 0.0, 0.5
    while index:
        number += share * (index & 1)
        index >>= 1
        share /= 2
    return number


def rotated(first: float, count: int) -> list[float]:
    """Return `count` depths at equal distances round the text, ascending; one of them is `first`."""
    return sorted(round((first + number / count) % 1.0, 6) for number in range(count))

"""Tasks of retrieval: numbers hidden in a text, of one name or several.

The kinds are those of RULER (Hsieh et al. 2024, arXiv 2404.06654): single, multi-key, multi-value and multi-query
needles in a haystack. Knows names and numbers; does not know tokens.
"""

from __future__ import annotations

import random

from dash_dist.evaluation.question import Question, hidden_facts, rotated
from dash_dist.evaluation.words import invented_words

_SEVERAL = 4
"""Names or numbers of the tasks with several: RULER's default."""


def single(rng: random.Random, depth: float) -> Question:
    """The number of the one name in the text."""
    return _one_number(rng, depth, others=0)


def multi_key(rng: random.Random, depth: float) -> Question:
    """The number of one of several names."""
    return _one_number(rng, depth, others=_SEVERAL - 1)


def multi_value(rng: random.Random, depth: float) -> Question:
    """All numbers of one name."""
    (name,) = invented_words(rng, 1)
    numbers, depths = _numbers(rng, _SEVERAL), rotated(depth, _SEVERAL)
    facts = [(at, f"A number of {name} is {number}.") for at, number in zip(depths, numbers, strict=True)]
    introduction = f"One name has {_SEVERAL} numbers in this text."
    question = f"The {_SEVERAL} numbers of {name}, from first to last:"
    return hidden_facts(rng, introduction, facts, question, numbers, depths)


def multi_query(rng: random.Random, depth: float) -> Question:
    """The numbers of several names, in an order that is not that of the text."""
    names, numbers, depths = invented_words(rng, _SEVERAL), _numbers(rng, _SEVERAL), rotated(depth, _SEVERAL)
    facts = [(at, _fact(name, number)) for at, name, number in zip(depths, names, numbers, strict=True)]
    order = rng.sample(range(_SEVERAL), _SEVERAL)
    introduction = "Some names have a number in this text."
    question = f"The numbers of {', '.join(names[i] for i in order)}, in this order:"
    return hidden_facts(rng, introduction, facts, question, [numbers[i] for i in order], [depths[i] for i in order])


def _one_number(rng: random.Random, depth: float, *, others: int) -> Question:
    names, numbers = invented_words(rng, 1 + others), _numbers(rng, 1 + others)
    depths = [depth, *(rng.random() for _ in range(others))]
    facts = [(at, _fact(name, number)) for at, name, number in zip(depths, names, numbers, strict=True)]
    introduction = "A name has a number in this text." if not others else "Some names have a number in this text."
    return hidden_facts(rng, introduction, facts, f"The number of {names[0]} is", numbers[:1], depths[:1])


def _fact(name: str, number: str) -> str:
    return f"The number of {name} is {number}."


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]

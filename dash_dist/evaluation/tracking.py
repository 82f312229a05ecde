"""Variable tracking: names that get their value from each other, one after the other.

The kind is that of RULER (arXiv 2404.06654). Knows names and values; does not know tokens.
"""

from __future__ import annotations

import random

from dash_dist.evaluation.question import Question, hidden_facts, rotated
from dash_dist.evaluation.words import invented_words

_HOPS = 4
"""Assignments from a name to a name: RULER's default."""


def variable_tracking(rng: random.Random, depth: float) -> Question:
    """All names with one value, of two chains of assignments; the other chain has another value."""
    count = _HOPS + 1
    names = invented_words(rng, 2 * count)
    value, other = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    depths = rotated(depth, count)
    facts = _chain(names[:count], value, depths) + _chain(
        names[count:], other, sorted(rng.random() for _ in range(count))
    )
    introduction = "Names get a value, or that of another name, in this text."
    question = f"The {count} names with the value {value}, from first to last:"
    return hidden_facts(rng, introduction, facts, question, names[:count], depths)


def _chain(names: list[str], value: str, depths: list[float]) -> list[tuple[float, str]]:
    sources = [value, *names]
    return [(at, f"Let {name} be {source}.") for at, name, source in zip(depths, names, sources, strict=False)]

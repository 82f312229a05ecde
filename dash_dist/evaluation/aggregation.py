"""Tasks of aggregation: words to count over the whole text.

The kinds are those of RULER (arXiv 2404.06654), common and frequent words. Knows words; does not know tokens.
"""

from __future__ import annotations

import itertools
import random

from dash_dist.evaluation.question import Question
from dash_dist.evaluation.words import invented_words

_COMMON = 5
_OF_COMMON, _OF_OTHERS = 30, 3
"""How often a common word and any other occurs: RULER's defaults."""
_FREQUENT = 3


def common_words(rng: random.Random, depth: float) -> Question:
    """The words that occur often; every other word occurs three times. `depth` is not read."""
    common = invented_words(rng, _COMMON)
    seed = rng.getrandbits(64)

    def text(units: int) -> str:
        often = min(_OF_COMMON, units // (2 * _COMMON))
        others = units - often * _COMMON
        counts = [often] * _COMMON + [_OF_OTHERS] * (others // _OF_OTHERS) + [1] * (others % _OF_OTHERS)
        question = f"The {_COMMON} words that occur most often:"
        return _counted(seed, common, counts, question)

    return Question(text, 12 * _COMMON, " " + ", ".join(common), tuple(common))


def frequent_words(rng: random.Random, depth: float) -> Question:
    """The most frequent words, where word k occurs in proportion to 1 / k^2. `depth` is not read."""
    frequent = invented_words(rng, _FREQUENT)
    seed = rng.getrandbits(64)

    def text(units: int) -> str:
        shares = (int(0.6 * units / rank**2) for rank in itertools.count(1))
        counts = list(itertools.takewhile(bool, shares))
        counts += [1] * (units - sum(counts))
        question = f"The {_FREQUENT} words that occur most often, the most frequent first:"
        return _counted(seed, frequent, counts, question)

    return Question(text, 60, " " + ", ".join(frequent), tuple(frequent))


def _counted(seed: int, known: list[str], counts: list[int], question: str) -> str:
    """Words in random order: `known` and then other ones, each as often as `counts` says."""
    rng = random.Random(seed)
    candidates = invented_words(rng, len(counts) + len(known))
    others = [word for word in candidates if word not in known]
    words = [word for word, count in zip([*known, *others], counts, strict=False) for _ in range(count)]
    rng.shuffle(words)
    return f"\nA list of words:\n{' '.join(words)}.\n{question}"

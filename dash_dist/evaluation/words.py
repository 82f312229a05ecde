"""Text without content: sentences to hide facts among, and words that no sentence has.

Knows its vocabulary; does not know tokens or tasks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words("""
    amber ancient bright broad careful cheerful cold crooked distant dusty eager empty faint gentle golden green
    heavy hollow humble idle little lonely mild narrow noisy old pale patient plain proud quiet rough sandy
    silent slow small steep stony sturdy tall warm weary wide winding wooden young
""")
NOUNS = _words("""
    baker barn basket bell bench bridge carpenter cart castle clock cloud coast copper courtyard ditch farmer
    fence ferry field forest garden gate glassblower harbour hedge hill horse island kitchen ladder lantern
    lighthouse market meadow mill miller mountain orchard oven painter path pond quarry road roof sailor school
    shepherd spring stable station storm tower valley village wagon wall well willow window workshop
""")
VERBS = _words("""
    belongs changes drifts ends faces falls grows hides leans leads listens moves opens passes points remains
    rests returns rises shines sleeps stands starts stays stops stretches turns waits walks watches works
""")
PLACES = _words("""
    above across along around behind below beyond by near opposite past round towards under with
""")

_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
_INVENTED = len(_SYLLABLES) ** 3


def invented_words(rng: random.Random, count: int) -> list[str]:
    """Return different words of three syllables, such as "dovita"; none is a word of `Filler`.

    Raises:
        ValueError: there are not so many.
    """
    if count > _INVENTED:
        raise ValueError(f"{count} different words are asked for, and there are {_INVENTED}: take a shorter text")
    return [_invented(number) for number in rng.sample(range(_INVENTED), count)]


def _invented(number: int) -> str:
    base = len(_SYLLABLES)
    return _SYLLABLES[number // base**2] + _SYLLABLES[number // base % base] + _SYLLABLES[number % base]


class Filler:
    """Sentences in an endless row, drawn from `rng` when they are first asked for."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._sentences: list[str] = []

    def first(self, count: int) -> Sequence[str]:
        """Return the first `count` sentences; earlier calls do not change them."""
        while len(self._sentences) < count:
            self._sentences.append(self._sentence())
        return self._sentences[:count]

    def _sentence(self) -> str:
        choose = self._rng.choice
        thing = f"{choose(ADJECTIVES)} {choose(NOUNS)}"
        return f"The {thing} {choose(VERBS)} {choose(PLACES)} the {choose(ADJECTIVES)} {choose(NOUNS)}."

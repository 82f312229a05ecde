"""The section `trainable:`, the parameters that a run changes and their learning rates.

Knows patterns over names; does not know which names a model has.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from pydantic import Field

from dash_dist.config.section import Section

_SHOWN = 3


class TrainablePattern(Section):
    """Parameters whose names in the whole model match, with their learning rate."""

    match: str = Field(
        min_length=1, description="`*` stands for any characters, `?` for one, `[...]` for one of several"
    )
    lr: float | None = Field(
        default=None, gt=0.0, description="follows the schedule of optimizer.lr, scaled; None: optimizer.lr"
    )


class TrainableSection(Section):
    """Parameters that are trained. Every other one is frozen: no gradient and no optimizer state.

    Attributes:
        parameters: the first pattern that matches a name decides on it, and a name that none matches is frozen. None
            trains every parameter at optimizer.lr.
    """

    parameters: tuple[TrainablePattern, ...] | None = Field(default=None, min_length=1)

    def trains(self, name: str) -> bool:
        """Return whether the parameter of this name is trained, without a check of the patterns."""
        return self.parameters is None or any(fnmatchcase(name, pattern.match) for pattern in self.parameters)

    def learning_rates(self, names: Iterable[str]) -> dict[str, float | None]:
        """Return the names of the parameters that train, with their learning rate; None for `optimizer.lr`.

        Args:
            names: of every parameter of the whole model (`megatron.weights.global_name`).

        Raises:
            ValueError: a pattern decides on no name.
        """
        names = list(names)
        if self.parameters is None:
            return dict.fromkeys(names)
        rates: dict[str, float | None] = {}
        for pattern in self.parameters:
            matching = [name for name in names if fnmatchcase(name, pattern.match)]
            if not matching:
                raise ValueError(
                    f"trainable.parameters: {pattern.match} matches no parameter; near misses are "
                    f"{', '.join(_near_misses(pattern.match, names))}"
                )
            if rates.keys() >= set(matching):
                raise ValueError(
                    f"trainable.parameters: earlier patterns match all {len(matching)} parameters of {pattern.match}: "
                    "put it before them, or drop it"
                )
            for name in matching:
                rates.setdefault(name, pattern.lr)
        return rates


def _near_misses(pattern: str, names: Iterable[str]) -> list[str]:
    """Return names, those of all layers as one, that share most words with the pattern."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    words = {word for kind in kinds for word in kind.split(".")} - {"*"}
    close: dict[str, float] = {}
    for part in re.split(r"[.*?\[\]]+", pattern):
        for word in difflib.get_close_matches(part, words, n=2):
            close[word] = max(close.get(word, 0.0), difflib.SequenceMatcher(None, part, word).ratio())
    return sorted(kinds, key=lambda kind: -sum(close.get(word, 0.0) for word in kind.split(".")))[:_SHOWN]

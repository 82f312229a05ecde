"""The section `trainable:`, the parameters that a run changes, adapters, and their learning rates.

Knows patterns over names; does not know which names a model has.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal, get_args

from pydantic import Field, field_validator

from dash_dist.config.section import Section

_SHOWN = 3
ADAPTERS = ".lora."
"""Part of the names of adapters' parameters, and of no other."""


class TrainablePattern(Section):
    """Parameters whose names in the whole model match, with their learning rate."""

    match: str = Field(
        min_length=1, description="`*` stands for any characters, `?` for one, `[...]` for one of several"
    )
    lr: float | None = Field(
        default=None, gt=0.0, description="follows the schedule of optimizer.lr, scaled; None: optimizer.lr"
    )


Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Section):
    """Low-rank adapters beside frozen linears: y = W x + alpha / rank x B A x (arXiv 2106.09685).

    Attributes:
        linears: by their names in transformers, each with its own A [rank, in] and B [out, rank].
    """

    linears: tuple[Linear, ...] = Field(default=get_args(Linear), min_length=1)
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0.0)
    lr: float | None = Field(default=None, gt=0.0, description="of A and B; None: optimizer.lr")

    @field_validator("linears")
    @classmethod
    def _linears_differ(cls, linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
        if len(set(linears)) < len(linears):
            raise ValueError("names a linear twice: name each once")
        return linears

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank

    @property
    def identity(self) -> dict[str, object]:
        """Settings that the adapters of a checkpoint must share."""
        return {"linears": sorted(self.linears), "rank": self.rank, "alpha": self.alpha}


class TrainableSection(Section):
    """Parameters that are trained. Every other one is frozen: no gradient and no optimizer state.

    Attributes:
        parameters: the first pattern that matches a name decides on it, and a name that none matches is frozen. None
            trains every parameter at optimizer.lr; with `lora`, `summary_query` alone.
        lora: adapters, which are trained as well.
    """

    parameters: tuple[TrainablePattern, ...] | None = Field(default=None, min_length=1)
    lora: LoraConfig | None = None

    @property
    def patterns(self) -> tuple[TrainablePattern, ...] | None:
        """Patterns of the model's own parameters; None for all of them."""
        if self.parameters is None and self.lora is not None:
            return (TrainablePattern(match="*.summary_query"),)
        return self.parameters

    def check_conversion(self) -> None:
        """Refuse, with ValueError, to train in a conversion phase anything but `summary_query`."""
        others = ["every parameter"] if self.patterns is None else []
        others += [one.match for one in self.patterns or () if not one.match.endswith("summary_query")]
        if others or self.lora is not None:
            raise ValueError(
                f"attention.conversion trains summary_query alone, and {(others or ['trainable.lora'])[0]} would get "
                'no gradient: set trainable.parameters to [{match: "*.summary_query"}], without trainable.lora'
            )

    def trains(self, name: str) -> bool:
        """Return whether the parameter of this name is trained, without a check of the patterns."""
        patterns = self.patterns
        if patterns is None or (self.lora is not None and ADAPTERS in name):
            return True
        return any(fnmatchcase(name, pattern.match) for pattern in patterns)

    def learning_rates(self, names: Iterable[str]) -> dict[str, float | None]:
        """Return the names of the parameters that train, with their learning rate; None for `optimizer.lr`.

        Args:
            names: of every parameter of the whole model (`megatron.weights.global_name`), adapters excluded.

        Raises:
            ValueError: a pattern decides on no name.
        """
        names = list(names)
        patterns = self.patterns
        if patterns is None:
            return dict.fromkeys(names)
        rates: dict[str, float | None] = {}
        for pattern in patterns:
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


def check_adapters(stages: Sequence[tuple[str, LoraConfig | None]]) -> None:
    """Refuse, with ValueError, stages that change or drop the adapters of one before.

    Args:
        stages: name and adapters of each.
    """
    for (before, adapters), (name, others) in pairwise(stages):
        if adapters is not None and (others is None or others.identity != adapters.identity):
            raise ValueError(
                f"stage {before} trains adapters and stage {name} has {'none' if others is None else 'others'}: give "
                "both the same trainable.lora, or export after the first and name that in model.weights of another run"
            )


def _near_misses(pattern: str, names: Iterable[str]) -> list[str]:
    """Return names, those of all layers as one, that share most words with the pattern."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    words = {word for kind in kinds for word in kind.split(".")} - {"*"}
    close: dict[str, float] = {}
    for part in re.split(r"[.*?\[\]]+", pattern):
        for word in difflib.get_close_matches(part, words, n=2):
            close[word] = max(close.get(word, 0.0), difflib.SequenceMatcher(None, part, word).ratio())
    return sorted(kinds, key=lambda kind: -sum(close.get(word, 0.0) for word in kind.split(".")))[:_SHOWN]

"""The section `model.positions`, rotary positions and their scaling to longer sequences.

Knows the parameters of each type and their limits; does not know how angles are computed.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dash_dist.config.section import Section

Factor = Annotated[float, Field(gt=0.0)]

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_positions", "length"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": ("factor", "original_max_positions"),
    "longrope": ("short_factor", "long_factor", "original_max_positions"),
}
"""Parameters that each type must have."""
OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
"""Parameters that a type may have besides."""


class PositionsConfig(Section):
    """Scaling of the rotary frequencies; every type and parameter as in transformers.

    A parameter that the type does not have is refused.
    """

    type: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = Field(
        default="default", description="dynamic is frozen at `length`: the frequencies do not follow the sequence"
    )
    max_positions: int | None = Field(default=None, gt=1, description="longest sequence in tokens; None: no limit")
    original_max_positions: int | None = Field(
        default=None, gt=1, description="longest sequence of training before the scaling, in tokens"
    )
    factor: float | None = Field(default=None, ge=1.0)
    length: int | None = Field(default=None, gt=1, description="tokens for which type dynamic sets its frequencies")
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    attention_factor: Factor | None = Field(
        default=None, description="multiplies rotated queries and keys; None: what the type's paper recommends"
    )
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    mscale: Factor | None = None
    mscale_all_dim: Factor | None = None
    truncate: bool | None = None
    short_factor: tuple[Factor, ...] | None = Field(
        default=None, description="divides each frequency in runs of up to original_max_positions tokens"
    )
    long_factor: tuple[Factor, ...] | None = Field(
        default=None, description="divides each frequency in runs of longer sequences"
    )

    @property
    def limit(self) -> int | None:
        """The longest sequence in tokens; None if there is no limit."""
        if self.type == "dynamic":
            return max(self.length or 0, self.original_max_positions or 0)
        return self.max_positions

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the type that are set, by name."""
        names = (*NEEDED[self.type], *OPTIONAL.get(self.type, ()))
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _type_has_the_parameters(self) -> Self:
        needed = NEEDED[self.type]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"model.positions.type {self.type} needs {', '.join(missing)}: set model.positions.{missing[0]}"
            )
        known = {"type", "max_positions", *needed, *OPTIONAL.get(self.type, ())}
        foreign = [name for name in type(self).model_fields if name not in known and getattr(self, name) is not None]
        if foreign:
            raise ValueError(
                f"model.positions.{foreign[0]} is not a parameter of type {self.type}, which has "
                f"{', '.join(sorted(known - {'type'}))}: drop it or change the type"
            )
        if self.type == "dynamic" and self.max_positions is not None:
            raise ValueError("model.positions.max_positions is given with type dynamic: drop it; `length` is the limit")
        if self.type == "llama3":
            low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
            if low >= high:
                raise ValueError(
                    f"model.positions.low_freq_factor {low:g} is not below high_freq_factor {high:g}: lower it"
                )
        if self.type == "longrope" and self.factor is None and self.attention_factor is None:
            raise ValueError(
                "model.positions.type longrope needs factor or attention_factor: set factor to "
                "max_positions / original_max_positions"
            )
        return self

    def check_head_dim(self, head_dim: int) -> None:
        """Refuse, with ValueError, factors that are not one per pair of channels."""
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != head_dim // 2:
                raise ValueError(
                    f"model.positions.{name} has {len(factors)} factors: give head_dim / 2 = {head_dim // 2}"
                )

    @property
    def resolved_attention_factor(self) -> float:
        """Factor of rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor or 1.0
        if factor <= 1.0:
            return 1.0
        if self.type == "longrope":
            assert self.original_max_positions is not None
            return math.sqrt(1 + math.log(factor) / math.log(self.original_max_positions))
        if self.type != "yarn":
            return 1.0
        recommended = [
            0.1 * scale * math.log(factor) + 1.0 for scale in (self.mscale or 0.0, self.mscale_all_dim or 0.0)
        ]
        if self.mscale and self.mscale_all_dim:
            return recommended[0] / recommended[1]
        return 0.1 * math.log(factor) + 1.0

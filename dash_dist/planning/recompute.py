"""Ways to recompute a layer, from the one that keeps most to the one that keeps least.

Knows the settings and the parts of a layer; does not know bytes nor seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from dash_dist.config.parallel import ParallelConfig, RecomputeModule


@dataclass(frozen=True)
class Recompute:
    """`parallel.recompute` and `parallel.recompute_modules`."""

    mode: str = "none"
    modules: tuple[RecomputeModule, ...] | None = None

    @staticmethod
    def of(parallel: ParallelConfig) -> Recompute:
        """The one that a configuration asks for."""
        return Recompute(parallel.recompute, parallel.recompute_modules)

    @property
    def parallel(self) -> dict[str, object]:
        """The settings."""
        return {"recompute": self.mode, "recompute_modules": self.modules}

    @property
    def attention(self) -> bool:
        """The attention's output is computed twice."""
        return self.mode == "full"

    @property
    def projections(self) -> bool:
        """Norm, projections and rotary embedding around the attention are computed twice."""
        return self._has("projections")

    @property
    def mlp(self) -> bool:
        """The MLP is computed twice."""
        return self._has("mlp")

    @property
    def whole(self) -> bool:
        """The layer is recomputed as one, from its input."""
        return self.projections and self.mlp

    def _has(self, module: RecomputeModule) -> bool:
        return self.mode != "none" and (self.modules is None or module in self.modules)

    def __str__(self) -> str:
        return self.mode if self.modules is None else f"{self.mode} [{', '.join(self.modules)}]"

    def overrides(self, before: Recompute) -> str:
        """Settings to add to a command line in place of those of `before`."""
        words = f"parallel.recompute={self.mode}"
        if self.modules == before.modules:
            return words
        modules = "null" if self.modules is None else f"[{','.join(self.modules)}]"
        return f"{words} parallel.recompute_modules={modules}"


WAYS = (
    Recompute(),
    Recompute("selective", ("projections",)),
    Recompute("selective", ("mlp",)),
    Recompute("selective"),
    Recompute("full"),
)


def more_than(one: Recompute) -> tuple[Recompute, ...]:
    """The ways that recompute more, the next one first."""
    parts = (one.attention, one.mlp, one.projections)
    return tuple(way for way in WAYS if (way.attention, way.mlp, way.projections) > parts)

"""Ways to recompute a layer, from the one that keeps most to the one that keeps least.

Knows the settings and the parts of a layer; does not know bytes nor seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dash_dist.config.parallel import ParallelConfig, RecomputeModule


@dataclass(frozen=True)
class Recompute:
    """`parallel.recompute`, `parallel.recompute_modules` and `parallel.recompute_layers`."""

    mode: str = "none"
    modules: tuple[RecomputeModule, ...] | None = None
    layers: int | None = None

    @staticmethod
    def of(parallel: ParallelConfig) -> Recompute:
        """The one that a configuration asks for."""
        return Recompute(parallel.recompute, parallel.recompute_modules, parallel.recompute_layers)

    @property
    def parallel(self) -> dict[str, object]:
        """The settings."""
        return {"recompute": self.mode, "recompute_modules": self.modules, "recompute_layers": self.layers}

    def of_layers(self, layers: int | None) -> Recompute:
        """The same way in so many layers of a stage; None: in all."""
        return replace(self, layers=layers)

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
        modules = "" if self.modules is None else f" [{', '.join(self.modules)}]"
        layers = "" if self.layers is None else f" of {self.layers} layer{'s' * (self.layers > 1)}"
        return f"{self.mode}{modules}{layers}"

    def overrides(self, before: Recompute) -> str:
        """Settings to add to a command line in place of those of `before`; empty where they are the same."""
        if self == before:
            return ""
        words = []
        if self.of_layers(None) != before.of_layers(None):
            words.append(f"parallel.recompute={self.mode}")
        if self.modules != before.modules:
            modules = "null" if self.modules is None else f"[{','.join(self.modules)}]"
            words.append(f"parallel.recompute_modules={modules}")
        if self.layers != before.layers:
            words.append(f"parallel.recompute_layers={'null' if self.layers is None else self.layers}")
        return " ".join(words)


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

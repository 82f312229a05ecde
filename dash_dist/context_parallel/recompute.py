"""What a layer's forward pass leaves for its recomputation: who needs which chunks is found once.

Knows the order of passes; does not know layers, nor why they are recomputed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dash_dist.context_parallel.exchanges import Exchange
from dash_kernels.spec import Routing


@dataclass(frozen=True)
class Found:
    """What the passes over the same inputs share. Holds no K and V, but a row of numbers per token and head."""

    routing: Routing
    exchange: Exchange


class ForwardMemory:
    """Of one layer under activation checkpointing, where a forward pass without gradients comes first and one with
    gradients, over the same inputs, just before the backward pass.

    Micro-batches are recomputed in the order of their forward passes, as every pipeline schedule does.
    """

    def __init__(self) -> None:
        self._found: deque[Found] = deque()

    def remember(self, found: Found) -> None:
        self._found.append(found)

    def recall(self) -> Found | None:
        """What the earliest pass that was not recomputed yet has found; None if there is none."""
        return self._found.popleft() if self._found else None

    def clear(self) -> None:
        """Forgets passes that will not be recomputed: of a step that failed."""
        self._found.clear()

"""Results that the first forward pass of a recomputed layer leaves to the second one.

Knows the order of passes; does not know layers, nor why they are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from dash_dist.context_parallel.exchange import Exchange
from dash_kernels.spec import Routing

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class RoutedPass:
    """Routing and exchange that all passes over the same inputs share.

    Holds no K and V, but a row of numbers or a list of chunks per token and head, and the backend's masks: in Triton a
    bit per tile of queries and chunk of the whole sequence.
    """

    routing: Routing
    exchange: Exchange


class ForwardMemory(Generic[Kept]):
    """Forward passes of one layer under reentrant activation checkpointing, and what each of them keeps.

    A forward pass without gradients comes first. A second one, with gradients and over the same inputs, runs in the
    backward pass of the checkpoint's autograd node. Nodes are numbered when they are made, the checkpoint's before its
    first pass, so a node recomputes the earliest pass after its number. Micro-batches may therefore be recomputed in
    any order. Passes that are never recomputed only cost memory, until `clear`. A node that is recomputed again, for a
    second backward pass over a retained graph, finds nothing: its own pass was used, the next is another micro-batch's.
    """

    def __init__(self) -> None:
        # Keyed by the number of the next node when the pass ended: unique, since the attention itself takes one.
        self._passes: dict[int, Kept] = {}

    def remember(self, kept: Kept) -> None:
        """Keeps a pass without gradients for its recomputation."""
        self._passes[torch._C._autograd._get_sequence_nr()] = kept

    def recall(self) -> Kept | None:
        """Takes the pass that is being recomputed; None if it left nothing, or none is being recomputed."""
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        # The node itself stores which backward pass recomputed it first, for as long as the node lives.
        backward_pass = torch._C._current_graph_task_id()
        metadata: Any = node.metadata  # a dict, whatever torch's stubs say
        if metadata.setdefault(self, backward_pass) != backward_pass:
            return None
        number = min((number for number in self._passes if number > node._sequence_nr()), default=None)
        return None if number is None else self._passes.pop(number)

    def __len__(self) -> int:
        """Number of passes that were not recomputed yet."""
        return len(self._passes)

    def clear(self) -> None:
        """Drops passes that will not be recomputed, after a failed step."""
        self._passes.clear()

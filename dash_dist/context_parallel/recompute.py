"""What a layer's forward pass leaves for its recomputation: who needs which chunks is found once.

Knows the order of passes; does not know layers, nor why they are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dash_dist.context_parallel.exchanges import Exchange
from dash_kernels.spec import Routing


@dataclass(frozen=True)
class Found:
    """What the passes over the same inputs share. Holds no K and V, but a row of numbers per token and head, and the
    backend's masks: in Triton a bit per tile of queries and chunk of the whole sequence.
    """

    routing: Routing
    exchange: Exchange


class ForwardMemory:
    """Of one layer under reentrant activation checkpointing: a forward pass without gradients comes first, and one with
    gradients, over the same inputs, in the backward pass of the autograd node that the checkpoint is.

    Nodes are numbered as they are made, the checkpoint's before its first pass: what a node recomputes is the earliest
    pass after that number. So micro-batches may be recomputed in any order, and passes without gradients that are never
    recomputed do no harm but to memory, until `clear`. A node that is recomputed again, for a second backward pass over
    a retained graph, finds nothing: what it left was used up, and what comes next is another micro-batch's.
    """

    def __init__(self) -> None:
        # By the number of the next node when the pass ended: never twice, for the attention itself takes one.
        self._found: dict[int, Found] = {}

    def remember(self, found: Found) -> None:
        self._found[torch._C._autograd._get_sequence_nr()] = found

    def recall(self) -> Found | None:
        """What the pass that is being recomputed has found; None if it left nothing, or none is being recomputed."""
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        # The node itself remembers which backward pass recomputed it first, and forgets it when it dies.
        backward_pass = torch._C._current_graph_task_id()
        metadata: Any = node.metadata  # a dict, whatever torch's stubs say
        if metadata.setdefault(self, backward_pass) != backward_pass:
            return None
        number = min((number for number in self._found if number > node._sequence_nr()), default=None)
        return None if number is None else self._found.pop(number)

    def __len__(self) -> int:
        """Passes that were not recomputed yet."""
        return len(self._found)

    def clear(self) -> None:
        """Forgets passes that will not be recomputed: of a step that failed."""
        self._found.clear()

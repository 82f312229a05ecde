"""Rules that select a fixed number of chunks per token, in the place of DashAttention's routing.

Knows the rules' settings; does not know tensors, as `listed_routing` does, which applies them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TopChunks:
    """Selection by the summaries of DashAttention: the own chunk, and the earlier ones of the highest probability.

    A chunk's probability is the softmax of the routing logits, averaged over the query heads of a KV head. Of chunks
    with equal ones the earliest goes first. Raises ValueError for a count below 2.

    Attributes:
        count: chunks that a token selects, the own one counted, where its document has as many.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"count is {self.count}: give 2 chunks or more, the own one and an earlier one")


Selection = TopChunks

"""Rules that select a fixed number of chunks per token, in the place of DashAttention's routing.

Knows the rules' settings; does not know tensors: `selection_scores` has their scores, `listed_routing` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIDE = 16
"""Tokens from one of InfLLMv2's kernels to the next; a kernel is twice as long."""


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


@dataclass(frozen=True)
class InfLLMv2:
    """Selection of InfLLMv2 (arXiv 2509.24663): means of 32 keys every 16 tokens, pooled into chunks.

    A token's probability of a kernel, which ends at or before it, is the softmax of q . mean; those of a KV head's
    query heads are added up. A chunk has the largest of the kernels that overlap it. The chunks with the highest are
    selected, of equal ones the earliest; some always are. Raises ValueError for a count that these exceed.

    Attributes:
        count: chunks that a token selects, the own and the others that are always selected counted.
        first_chunks: of a document, always selected.
        local_chunks: before the own one, always selected.
        dense_length: tokens; documents up to this length select every earlier chunk.
    """

    count: int
    first_chunks: int = 1
    local_chunks: int = 32
    dense_length: int = 8192

    def __post_init__(self) -> None:
        always = self.first_chunks + self.local_chunks + 1
        if self.count < always:
            raise ValueError(
                f"count is {self.count}, and {always} chunks are always selected: {self.first_chunks} first and "
                f"{self.local_chunks} local ones, and the own one; raise count, or select fewer of them"
            )


SelectionRule = TopChunks | InfLLMv2

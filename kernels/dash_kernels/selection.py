"""Rules that select a fixed number of chunks per token, in the place of DashAttention's routing.

Knows the rules' settings; does not know tensors: `selection_scores` has their scores, `listed_routing` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIDE = 16
"""Tokens from one of InfLLMv2's kernels, or NSA's blocks, to the next; each is twice as long."""
BLOCK = 2 * STRIDE
"""Tokens of a block of NSA."""


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
        _check_count(self.count, self.first_chunks, self.local_chunks)


@dataclass(frozen=True)
class NSA:
    """Selection of Native Sparse Attention (arXiv 2502.11089), by the softmax of its compressed branch.

    A chunk's score is the sum of the probabilities of the blocks of 32 tokens that overlap it, each times the halves of
    the block in it, added up over the query heads of a KV head. The chunks with the highest are selected, of equal ones
    the earliest; some always are. Raises ValueError for a count that these exceed.

    Attributes:
        count: chunks that a token selects, the own and the others that are always selected counted.
        first_chunks: of a document, always selected.
        local_chunks: before the own one, always selected.
    """

    count: int
    first_chunks: int = 1
    local_chunks: int = 1

    def __post_init__(self) -> None:
        _check_count(self.count, self.first_chunks, self.local_chunks)


SelectionRule = TopChunks | InfLLMv2 | NSA


def _check_count(count: int, first: int, local: int) -> None:
    always = first + local + 1
    if count < always:
        raise ValueError(
            f"count is {count}, and {always} chunks are always selected: {first} first and {local} local ones, and the "
            "own one; raise count, or select fewer of them"
        )

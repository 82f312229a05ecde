"""Grid of nodes x ranks of a context-parallel group: ranks of one node share a fast link.

Knows ranks; does not know hosts or bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Grid of nodes x ranks: every `ranks_per_node` consecutive ranks of `size` are a node.

    A rank's *column* is the ranks of equal index inside their nodes, itself included. Raises ValueError if
    ranks_per_node does not divide size.
    """

    size: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.size % self.ranks_per_node:
            divisors = [str(count) for count in range(1, self.size + 1) if self.size % count == 0]
            raise ValueError(
                f"ranks_per_node is {self.ranks_per_node}, which does not divide the context-parallel size "
                f"{self.size}: give one of {', '.join(divisors)}, or None to have the nodes found by host name"
            )

    @property
    def nodes(self) -> int:
        return self.size // self.ranks_per_node

    @property
    def is_two_level(self) -> bool:
        """True with links of both kinds: a block then crosses to a node once and is shared inside it."""
        return self.nodes > 1 and self.ranks_per_node > 1

    def place(self, rank: int) -> tuple[int, int]:
        """Node of a rank, and its index inside the node: its column."""
        return divmod(rank, self.ranks_per_node)

    def node_ranks(self, rank: int) -> range:
        """Ranks of a rank's node, itself included."""
        first = rank - rank % self.ranks_per_node
        return range(first, first + self.ranks_per_node)

    def column_ranks(self, rank: int) -> range:
        """Ranks of a rank's column, itself included."""
        return range(rank % self.ranks_per_node, self.size, self.ranks_per_node)

"""Nodes of a context-parallel group: ranks of one node share a fast link.

Knows ranks and host names; does not know what travels. Imports torch only to find nodes.
"""

from __future__ import annotations

import itertools
import logging
import socket
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

_found: weakref.WeakKeyDictionary[dist.ProcessGroup, Topology] = weakref.WeakKeyDictionary()


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

    @staticmethod
    def of(group: dist.ProcessGroup, ranks_per_node: int | None = None) -> Topology:
        """Topology of a group; with None, nodes are found by host name, by one collective per group.

        If nodes hold unequal numbers of the group's ranks, or ranks that are not consecutive, the group counts as one
        node. Results stay right, but a chunk crosses a slow link once per rank that needs it.
        """
        import torch.distributed as dist

        from dash_dist.context_parallel.errors import exchange_errors

        if ranks_per_node is not None:
            return Topology(dist.get_world_size(group), ranks_per_node)
        if group not in _found:
            hosts: list[str] = [""] * dist.get_world_size(group)
            with exchange_errors(group, "the exchange of host names"):
                dist.all_gather_object(hosts, socket.gethostname(), group=group)
            _found[group] = Topology(len(hosts), _ranks_per_node(hosts, speaks=dist.get_rank(group) == 0))
        return _found[group]


def _ranks_per_node(hosts: list[str], *, speaks: bool) -> int:
    """Ranks per node by the host name of every rank; all ranks if nodes are not runs of equal length."""
    runs = [(host, len(list(ranks))) for host, ranks in itertools.groupby(hosts)]
    lengths = {length for _, length in runs}
    if len(runs) == len(set(hosts)) and len(lengths) == 1:
        return lengths.pop()
    if speaks:
        logger.warning(
            "the context-parallel group's ranks are not spread evenly and in order over its hosts (%s): chunks may "
            "cross the slow links between them more than once; give every host the same number of consecutive ranks",
            ", ".join(f"{length} on {host}" for host, length in runs),
        )
    return len(hosts)

"""Discovery of the nodes of a context-parallel group.

Knows host names; does not know what travels.
"""

from __future__ import annotations

import itertools
import logging
import socket
import weakref

import torch.distributed as dist

from dash_dist.context_parallel.errors import exchange_errors
from dash_dist.cost_model.topology import Topology

logger = logging.getLogger(__name__)

_found: weakref.WeakKeyDictionary[dist.ProcessGroup, Topology] = weakref.WeakKeyDictionary()


def find_topology(group: dist.ProcessGroup, ranks_per_node: int | None = None) -> Topology:
    """Return the topology of a group; with None, nodes are found by host name, by one collective per group.

    If nodes hold unequal numbers of the group's ranks, or ranks that are not consecutive, the group counts as one
    node. Results stay right, but a chunk crosses a slow link once per rank that needs it.
    """
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

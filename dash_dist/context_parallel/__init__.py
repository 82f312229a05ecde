"""Context parallelism: a sequence split over the ranks of a group, and DashAttention over it.

Names are imported on first use, so that `cost` and `topology` work without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash_dist.context_parallel.errors import ExchangeError
    from dash_dist.context_parallel.exchange_counters import Traffic, TrafficSummary
    from dash_dist.context_parallel.layout import join_sequence, shard_positions, split_sequence
    from dash_dist.context_parallel.module import DashAttention
    from dash_dist.context_parallel.recompute import ForwardMemory
    from dash_dist.context_parallel.sharded_attention import dash_attention

_MODULE_OF = {
    "DashAttention": "module",
    "ExchangeError": "errors",
    "ForwardMemory": "recompute",
    "Traffic": "exchange_counters",
    "TrafficSummary": "exchange_counters",
    "dash_attention": "sharded_attention",
    "join_sequence": "layout",
    "shard_positions": "layout",
    "split_sequence": "layout",
}

__all__ = [
    "DashAttention",
    "ExchangeError",
    "ForwardMemory",
    "Traffic",
    "TrafficSummary",
    "dash_attention",
    "join_sequence",
    "shard_positions",
    "split_sequence",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)

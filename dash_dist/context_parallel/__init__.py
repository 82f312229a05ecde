"""Context parallelism: a sequence split over the ranks of a group, and DashAttention over it."""

from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.context_parallel.exchange_counters import Traffic, TrafficSummary
from dash_dist.context_parallel.layout import join_sequence, shard_positions, split_sequence
from dash_dist.context_parallel.module import DashAttention
from dash_dist.context_parallel.nsa import NSAAttention
from dash_dist.context_parallel.recompute import ForwardMemory
from dash_dist.context_parallel.sharded_attention import dash_attention
from dash_dist.context_parallel.window import WindowAttention

__all__ = [
    "DashAttention",
    "ExchangeError",
    "ForwardMemory",
    "NSAAttention",
    "Traffic",
    "TrafficSummary",
    "WindowAttention",
    "dash_attention",
    "join_sequence",
    "shard_positions",
    "split_sequence",
]

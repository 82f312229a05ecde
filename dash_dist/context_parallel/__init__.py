"""Context parallelism: a sequence split over the ranks of a group, and DashAttention over it."""

from dash_dist.context_parallel.attention import dash_attention
from dash_dist.context_parallel.errors import ExchangeError
from dash_dist.context_parallel.layout import join_sequence, shard_positions, split_sequence
from dash_dist.context_parallel.module import DashAttention
from dash_dist.context_parallel.recompute import ForwardMemory
from dash_dist.context_parallel.traffic import Traffic, TrafficSummary

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

"""DashAttention on one device: `dash_attention`, its float64 reference, and the backends that compute it."""

from dash_kernels.attention import dash_attention
from dash_kernels.chunks import ChunkGrid
from dash_kernels.reference import reference_dash_attention
from dash_kernels.spec import AttentionSpec, RoutingStatistics

__all__ = ["AttentionSpec", "ChunkGrid", "RoutingStatistics", "dash_attention", "reference_dash_attention"]

"""DashAttention on one device: `dash_attention`, its float64 reference, and the backends that compute it.

Public names are imported on first use, so that `dash_kernels.limits` is free of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash_kernels.attention import dash_attention
    from dash_kernels.chunks import ChunkGrid
    from dash_kernels.reference import reference_dash_attention
    from dash_kernels.spec import AttentionSpec, RoutingStatistics

_MODULES = {
    "AttentionSpec": "spec",
    "ChunkGrid": "chunks",
    "RoutingStatistics": "spec",
    "dash_attention": "attention",
    "reference_dash_attention": "reference",
}

__all__ = ["AttentionSpec", "ChunkGrid", "RoutingStatistics", "dash_attention", "reference_dash_attention"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

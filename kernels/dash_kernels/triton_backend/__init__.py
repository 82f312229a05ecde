"""The stages as Triton kernels (alpha = 1.5, float16, bfloat16, float32); the functions of `dash_kernels.eager`."""

from dash_kernels.triton_backend.backward import attend_backward, backward_whole, row_dots
from dash_kernels.triton_backend.forward import attend
from dash_kernels.triton_backend.routing import route
from dash_kernels.triton_backend.routing_backward import route_backward
from dash_kernels.triton_backend.selection import tile_efficiency
from dash_kernels.triton_backend.summary import summarize, summarize_backward

__all__ = [
    "attend",
    "attend_backward",
    "backward_whole",
    "route",
    "route_backward",
    "row_dots",
    "summarize",
    "summarize_backward",
    "tile_efficiency",
]

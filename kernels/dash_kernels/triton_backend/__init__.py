"""The stages as Triton kernels (alpha = 1.5, float16, bfloat16, float32); the functions of `dash_kernels.eager`."""

from dash_kernels.triton_backend.backward_keys import key_gradient
from dash_kernels.triton_backend.backward_queries import finish_query_gradient, query_gradient
from dash_kernels.triton_backend.forward import attend
from dash_kernels.triton_backend.masks import reached
from dash_kernels.triton_backend.routing import route
from dash_kernels.triton_backend.row_dots import row_dots
from dash_kernels.triton_backend.summary import summarize

__all__ = [
    "attend",
    "finish_query_gradient",
    "key_gradient",
    "query_gradient",
    "reached",
    "route",
    "row_dots",
    "summarize",
]

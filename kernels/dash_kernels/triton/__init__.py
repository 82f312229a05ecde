"""The stages as Triton kernels (alpha = 1.5, float16, bfloat16, float32); the functions of `dash_kernels.eager`."""

from dash_kernels.triton.attend import attend
from dash_kernels.triton.key_gradient import key_gradient
from dash_kernels.triton.query_gradient import finish_query_gradient, query_gradient
from dash_kernels.triton.reached import reached
from dash_kernels.triton.route import mark_one, route
from dash_kernels.triton.row_dots import row_dots
from dash_kernels.triton.summarize import summarize

__all__ = [
    "attend",
    "finish_query_gradient",
    "key_gradient",
    "mark_one",
    "query_gradient",
    "reached",
    "route",
    "row_dots",
    "summarize",
]

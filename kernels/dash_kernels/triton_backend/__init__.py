"""The stages as Triton kernels (alpha = 1.5, float16, bfloat16, float32); the functions of `dash_kernels.eager`."""

from dash_kernels.triton_backend.backward import attend_backward
from dash_kernels.triton_backend.forward import attend
from dash_kernels.triton_backend.routing import route, route_backward
from dash_kernels.triton_backend.summary import summarize, summarize_backward

__all__ = ["attend", "attend_backward", "route", "route_backward", "summarize", "summarize_backward"]

"""Steps of the ranks in `test_fused.py`: on the CPU, through Triton's interpreter."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from dash_dist.megatron import trained_model
from dash_dist.megatron.model import DashGPTModel, build_model
from tests.megatron.megatron_jobs import measure_step
from tests.support.models import Case, Measured


def measure_both(cases: dict[str, Case]) -> dict[str, tuple[Measured, Measured]]:
    """A step of each case in PyTorch, and one in the kernels."""
    return {name: (measure_step(case), fused_step(case)) for name, case in cases.items()}


def fused_step(case: Case) -> Measured:
    with fused_models():
        return measure_step(case)


@contextlib.contextmanager
def fused_models() -> Iterator[None]:
    """Models built inside take the kernels wherever they would on a GPU."""

    def fused(*args: Any, **kwargs: Any) -> DashGPTModel:
        return build_model(*args, **{**kwargs, "fused": True})

    with (
        mock.patch.object(trained_model, "build_model", fused),
        mock.patch.object(interpreter, "_implicit_cvt", _with_floats),
        mock.patch.object(rms_norm, "rsqrt", _rsqrt),  # of CUDA's library, which the interpreter has not
        mock.patch("dash_kernels.rotary._takes_triton", return_value=True),
    ):
        yield


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


_convert = interpreter._implicit_cvt


def _with_floats(argument: Any) -> Any:
    """Make a float argument a tensor as the compiler does; the interpreter leaves it a number of Python."""
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return _convert(argument)

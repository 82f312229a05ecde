"""Named ranges in the traces of PyTorch's profiler: the stages of the attention, and parts of a step.

Knows names and when a profiler runs; does not know who reads a trace. Without a profiler a range costs one comparison.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.autograd import profiler

PREFIX = "dash: "
"""Begins the names of all ranges in a trace."""

T = TypeVar("T")


def named_range(name: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a range `PREFIX + name`; an empty one without a profiler."""
    return profiler.record_function(PREFIX + name) if profiler._is_profiler_enabled else contextlib.nullcontext()


def ranged(name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator that makes every call of a function a range."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> T:
            with named_range(name):
                return function(*args, **kwargs)

        return call

    return decorate


def with_ranges(backend: T) -> T:
    """Return a backend whose stages are ranges while a profiler runs; `backend` itself otherwise."""
    return cast(T, _RangedStages(backend)) if profiler._is_profiler_enabled else backend


class _RangedStages:
    """The functions of a module, each a range of its name."""

    def __init__(self, stages: Any) -> None:
        self._stages = stages

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return ranged(name)(getattr(self._stages, name))

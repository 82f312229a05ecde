"""Agreement between the ranks of a run: flags and small Python objects, over a gloo group of their own.

Knows torch.distributed; does not know what is agreed on, nor the model's parallelism.
"""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dash_dist.distributed.first_failure import tell_failure
from dash_dist.errors import RunError, retryable

T = TypeVar("T")


class Agreement:
    """Small Python objects that the ranks of a process group exchange. Every method is a collective: all ranks call it.

    Args:
        group: the default process group by default.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @property
    def is_main(self) -> bool:
        """True at the rank that prints and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return `value` of every rank, in rank order, at every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main(self, value: T) -> T:
        """Return the main rank's `value` at every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def call_on_main(self, function: Callable[[], T]) -> T:
        """Call `function` at the main rank alone; return its value, or raise its OSError or ValueError, at every rank.

        Storage may look different to other ranks for a while: the main rank decides for all.
        """
        value: Any = None
        problem: Exception | None = None
        if self.is_main:
            try:
                value = function()
            except (OSError, ValueError) as error:
                problem = error
        value, problem = self.from_main((value, problem))
        if problem is not None:
            raise problem
        return value

    def raise_first(self, problem: Exception | None) -> None:
        """Raise the first rank's `problem`, if any rank has one, at every rank."""
        for found in self.gather(problem):
            if found is not None:
                raise found


class ControlGroup(Agreement):
    """All ranks of the run, over gloo: on GPU too, so that a flag never waits for the stream of kernels.

    Args:
        timeout: after this long without an answer a rank gives its peers up for lost and raises.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(dist.new_group(backend="gloo", timeout=timeout))

    def maximum(self, values: list[float]) -> list[float]:
        """Element-wise maximum over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    @contextlib.contextmanager
    def together(self, what: str, error_type: type[RunError]) -> Iterator[None]:
        """Run the body at every rank; if it raises at any, raise `error_type` with the first one's reason at all.

        The error is retryable if every rank's is.

        Without this a rank that fails alone leaves the others waiting in their next collective. The body may be a
        collective only if that collective itself fails at every rank. A defect may leave the others in one that the
        body had begun: they are told before.
        """
        failure, cause = None, None
        try:
            yield
        except Exception as error:
            failure, cause = (_reason(error), retryable(error)), error
            if _is_defect(error):
                tell_failure(error)
        try:
            failures = self.gather(failure)
        except RuntimeError as broken:  # the others have ended in another collective
            if failure is None or cause is None:
                raise
            if _is_defect(cause):
                raise cause from broken
            raise error_type(f"{what}: {failure[0]}", retryable=failure[1]) from broken
        _raise_together(what, error_type, [one for one in failures if one is not None], cause)

    def on_main(self, what: str, error_type: type[RunError], function: Callable[[], T]) -> T:
        """Call `function` at the main rank and return its value at every rank; raises as `together` does."""
        value: Any = None
        failure, cause = None, None
        if self.is_main:
            try:
                value = function()
            except Exception as error:
                failure, cause = (_reason(error), retryable(error)), error
        value, failure = self.from_main((value, failure))
        _raise_together(what, error_type, [] if failure is None else [failure], cause)
        return value


def _raise_together(
    what: str, error_type: type[RunError], failures: list[tuple[str, bool]], cause: Exception | None
) -> None:
    """Raise the first of the ranks' failures, (reason, retryable) each; `cause` is this rank's own."""
    if not failures:
        return
    can_retry = all(one for _, one in failures)
    if cause is not None and not can_retry and _is_defect(cause):
        raise cause  # its traceback is wanted
    raise error_type(f"{what}: {failures[0][0]}", retryable=can_retry) from cause


def _is_defect(error: Exception) -> bool:
    """Return whether an error is neither bad input nor one that may pass: a mistake of the program, or no memory."""
    return not isinstance(error, RunError | ValueError | OSError) and not retryable(error)


def _reason(error: Exception) -> str:
    if isinstance(error, RunError | ValueError):  # written to be read on their own
        return str(error)
    if isinstance(error, OSError):
        text = error.strerror or str(error)
        return f"{text}: {error.filename}" if error.filename else text
    return f"{type(error).__name__}: {error}"

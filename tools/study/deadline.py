"""The end of a call's time, for itself and for the processes that it starts.

Knows a moment of the machine's clock, which all its processes share; does not know what is stopped.
"""

from __future__ import annotations

import math
import time

from dash_dist.run.requests import Command, Request

_TO_SAVE = 5.0
"""Seconds before the limit at which a training stops, for its checkpoint."""


class OutOfTime(Exception):
    """The limit of this call has come before the end of a cell."""


class Deadline:
    """The moment at which this call has to end.

    Args:
        seconds: from now; None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._limit = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def near(self) -> bool:
        """It is time to save: nothing else begins."""
        return time.monotonic() >= self._limit - _TO_SAVE

    @property
    def over(self) -> bool:
        """The limit itself has come."""
        return time.monotonic() >= self._limit

    def check(self) -> None:
        """Raise OutOfTime once it is time to save."""
        if self.near:
            raise OutOfTime

    def command(self) -> Command:
        """Return the command to a training: to stop, once it is time to save."""
        return Command(Request.STOP if self.near else Request.GO_ON)

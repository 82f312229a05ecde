"""Requests to a run between two steps, and the ranks' agreement on them.

Knows the requests and their order; does not know who asks (a signal, Ray, a test) nor how a checkpoint is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum


class Request(IntEnum):
    """Action before the next step. If ranks or sources differ, the larger one counts."""

    GO_ON = 0
    SAVE = 1  # write a checkpoint now, then go on: a node is about to be taken away
    STOP = 2  # write a checkpoint and end the run


@dataclass(frozen=True)
class Asked:
    """One answer to "is there anything to do?".

    `reason` names what a SAVE is for, such as "node 10.0.0.7 is taken away at 12:30". A reason is heeded once in the
    life of the process, so whoever asks may repeat it before every step for as long as it holds.
    """

    request: Request = Request.GO_ON
    reason: str = ""

    def __post_init__(self) -> None:
        if self.request is Request.SAVE and not self.reason:
            raise ValueError("a request to save needs a reason, by which it is told from the one before")


Requests = Callable[[], Asked]
"""Asked at every rank before each step; it must return at once."""


def nothing_asked() -> Asked:
    """The Requests of a run that nobody asks for anything."""
    return Asked()


class RequestsOfRank:
    """The requests of one rank from all its sources, and which reasons to save were heeded.

    Args:
        requests: of whoever called `train`.
        stop_requested: whether a signal asked this process to stop.
    """

    def __init__(self, requests: Requests, stop_requested: Callable[[], bool]) -> None:
        self._requests = requests
        self._stop_requested = stop_requested
        self._heeded: set[str] = set()

    def poll(self) -> Asked:
        """Return this rank's current request, without reasons to save that were heeded before."""
        if self._stop_requested():
            return Asked(Request.STOP)
        asked = self._requests()
        return Asked() if asked.request is Request.SAVE and asked.reason in self._heeded else asked

    def heed(self, all_asked: list[Asked]) -> list[str]:
        """The new reasons to save among what the ranks asked for, each once; they are not reasons again."""
        reasons = dict.fromkeys(asked.reason for asked in all_asked if asked.request is Request.SAVE)
        new = [reason for reason in reasons if reason not in self._heeded]
        self._heeded.update(new)
        return new

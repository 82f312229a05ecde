"""Commands to a run between two steps, and the ranks' agreement on them.

Knows the commands and their order; does not know their sender (a signal, Ray, a test) nor how a checkpoint is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum


class Request(IntEnum):
    """Action before the next step. If ranks or sources differ, the larger one counts."""

    GO_ON = 0
    SAVE = 1  # write a checkpoint now, then continue: a node is about to be taken away
    STOP = 2  # write a checkpoint and end the run


@dataclass(frozen=True)
class Command:
    """One request with its reason.

    `reason` names the cause of a SAVE, such as "node 10.0.0.7 is taken away at 12:30". A process saves once for each
    reason: the sender may repeat a command before every step for as long as it holds.
    """

    request: Request = Request.GO_ON
    reason: str = ""

    def __post_init__(self) -> None:
        if self.request is Request.SAVE and not self.reason:
            raise ValueError("a request to save needs a reason, by which it is told from the one before")


Requests = Callable[[], Command]
"""Source of commands, called at every rank before each step; it must return at once."""


def nothing_asked() -> Command:
    """Return the command to continue: the source of a run without any other."""
    return Command()


class RequestsOfRank:
    """Commands to one rank from all its sources, without reasons to save that were heeded before.

    Args:
        requests: source given to `train`.
        stop_requested: returns True once a signal told this process to stop.
    """

    def __init__(self, requests: Requests, stop_requested: Callable[[], bool]) -> None:
        self._requests = requests
        self._stop_requested = stop_requested
        self._heeded: set[str] = set()

    def poll(self) -> Command:
        """Return this rank's current command."""
        if self._stop_requested():
            return Command(Request.STOP)
        command = self._requests()
        return Command() if command.request is Request.SAVE and command.reason in self._heeded else command

    def heed(self, commands: list[Command]) -> list[str]:
        """Return the new reasons to save in the ranks' commands, each once, and ignore them from now on."""
        reasons = dict.fromkeys(command.reason for command in commands if command.request is Request.SAVE)
        new = [reason for reason in reasons if reason not in self._heeded]
        self._heeded.update(new)
        return new
